"""The shipped small checkpoint, end to end: scenes it never saw, real commands, what it must still know."""

import json
from pathlib import Path

import pytest

from llava import cli
from llava.mini.evaluate import Pair


@pytest.fixture(scope="module")
def mini(root: Path) -> tuple[Path, Path]:
    """(checkpoint, base); skips where `llava mini prepare` has not been run."""
    base = root / "checkpoints" / "mini-base"
    if not (base / "config.json").is_file():
        pytest.skip(f"{base} is missing: `llava mini prepare` builds it (scripts/test.sh does)")
    return root / "checkpoints" / "mini-lora", base


@pytest.mark.slow
def test_it_answers_about_scenes_it_never_saw(mini, tmp_path, capsys):
    checkpoint, base = mini
    world, out = tmp_path / "world", tmp_path / "table"
    made = f"mini world --split test --n 16 --seed 3 --out {world}"
    asked = f"mini evaluate --model-path {checkpoint} --model-base {base} --data {world} --out {out}"
    assert cli.main(made.split()) == 0
    assert cli.main([*asked.split(), "--reducers", "prumerge", "random", "--device", "cpu"]) == 0
    report = json.loads((out / "table.json").read_text())
    kinds = {kind["name"]: kind for kind in report["kinds"]}
    questions = (world / "questions.jsonl").read_text().splitlines()
    assert sum(kind["n"] for kind in kinds.values()) == len(questions)

    def points_over_constant(name: str) -> float:
        cell = kinds[name]["cells"]["prumerge"]
        return 100 * (cell["right"] / cell["n"] - kinds[name]["share"])

    # The table in docs/mini.md says about 30; a few dozen questions leave some noise.
    assert points_over_constant("presence/yesno") > 10
    assert points_over_constant("naming/open") > 5
    random = next(spec for spec in report["tokens"] if spec.startswith("random"))
    assert round(report["tokens"]["prumerge"]) == report["tokens"][random]
    assert "constant answer" in capsys.readouterr().out
    assert report["pairs"]  # of the kinds with questions enough
    for pair in report["pairs"]:
        cells = kinds[pair["kind"]]["cells"]
        difference = cells["prumerge"]["right"] - cells[random]["right"]
        assert pair["other"] == random and pair["only_first"] - pair["only_other"] == difference


def test_exact_test_of_pairs():
    """Against sums one does on paper."""
    assert Pair("", "", 9, 5, 0).p == 2 / 32
    assert Pair("", "", 9, 0, 0).p == 1
    assert Pair("", "", 9, 2, 2).p == 1
    assert Pair("", "", 9, 1, 3).p == 2 * (1 + 4) / 16


def test_the_checkpoint_says_how_many_tokens_it_wants(root):
    config = json.loads((root / "checkpoints/mini-lora/config.json").read_text())
    assert config["mm_token_reducer"].startswith("prumerge")
