"""One run on several reducers: which sample is reduced how, alone, cached and resumed, and what it leaves."""

import json
from pathlib import Path

import pytest
from tiny_training import STAGES, Tiny, make

from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.reducers import build_reducer
from llava.train.arguments import parse
from llava.train.trainer import draw_reducers, epoch_order

SPECS = ["topk(tokens=2)", "pool(tokens=4)", "none"]
FLAGS = (
    f"{STAGES['lora']} --lora_dropout 0 --per_device_train_batch_size 1 --max_steps 16 --seed 3 "
    f"--save_steps 5 --lr_scheduler_type constant --mm_token_reducer '{'; '.join(SPECS)}'"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("run")
    return out, tiny.train(out, FLAGS)


def test_each_batch_has_the_tokens_of_the_reducer_it_drew(tiny: Tiny, run: tuple[Path, list[dict]]) -> None:
    rows = json.loads(tiny.data.read_text())
    choices = [build_reducer(spec) for spec in SPECS]
    expected: list[int | None] = []
    for epoch in range(2):
        drawn = draw_reducers(choices, len(rows), 3, epoch)
        for reducer, row in zip(drawn, epoch_order(len(rows), 3 + epoch), strict=True):
            count = {"topk": 2, "pool": 4, "none": 16}[reducer.name]
            expected.append(count if "image" in rows[row] else None)
    seen = [line.get("visual_tokens_per_image") for line in run[1]]
    assert seen == expected[:16]
    assert set(seen) == {2, 4, 16, None}


def test_the_samples_of_a_batch_share_a_draw(tiny: Tiny, tmp_path: Path) -> None:
    lines = tiny.train(tmp_path, f"{FLAGS} --per_device_train_batch_size 3 --max_steps 8 --logging_steps 1")
    counts = [line.get("visual_tokens_per_image") for line in lines]
    assert set(counts) <= {2, 4, 16, None} and len(set(counts) - {None}) > 1


def test_draws_depend_on_seed_and_epoch_and_on_how_often_a_reducer_is_named() -> None:
    one, other = build_reducer("none"), build_reducer("prumerge+")
    drawn = draw_reducers([one, other, other, other], 4000, 0, 0)
    assert 0.72 < drawn.count(other) / 4000 < 0.78
    assert drawn == draw_reducers([one, other, other, other], 4000, 0, 0)
    assert drawn != draw_reducers([one, other, other, other], 4000, 0, 1)
    assert drawn != draw_reducers([one, other, other, other], 4000, 1, 0)


def test_a_stopped_run_goes_on_with_the_same_draws(
    tiny: Tiny, run: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    tiny.train(tmp_path, f"{FLAGS} --max_steps 5")
    halves = tiny.train(tmp_path, FLAGS)
    for key in ("step", "loss", "visual_tokens_per_image"):
        assert [row.get(key) for row in halves] == [row.get(key) for row in run[1]]


def test_the_cache_has_the_tokens_of_every_draw(
    tiny: Tiny, run: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    cached = tiny.train(tmp_path / "run", f"{FLAGS} --visual_cache {tmp_path / 'cache'}")
    assert [row["loss"] for row in cached] == pytest.approx([row["loss"] for row in run[1]], abs=2e-3)
    key = "visual_tokens_per_image"
    assert [row.get(key) for row in cached] == [row.get(key) for row in run[1]]


def test_the_result_records_the_list_and_obeys_its_first(tiny: Tiny, run: tuple[Path, list[dict]]) -> None:
    config = json.loads((run[0] / "config.json").read_text())
    assert (config["mm_token_reducer"], config["mm_token_reducer_choices"]) == (SPECS[0], SPECS)
    _, model, _, _ = load_pretrained_model(str(run[0]), str(tiny.models.base), "llava-lora", device="cpu")
    assert model.reducer == build_reducer(SPECS[0])


def test_every_spec_of_a_list_is_checked(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prumergee"):
        parse(tiny.argv(tmp_path, "--mm_token_reducer 'none; prumergee'"))
