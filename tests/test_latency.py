"""`llava bench` times the real way of a request, in turn, and its sums are right. No test looks at a time."""

import argparse
import json

import pytest
import torch

from llava import hardware
from llava.analysis import bench, latency, random_model, roofline
from llava.analysis.shapes import SHAPES, LanguageShape, Shape, TowerShape
from llava.analysis.stopwatch import Spread, Stopwatch
from llava.errors import UserError
from llava.mm_utils import process_images
from llava.model.language_model import LANGUAGE_MODELS
from llava.reducers import build_reducer

TOWER = TowerShape("clip", 32, 48, 3, 2, image_size=84)
TINY = Shape(TOWER, LanguageShape(64, 96, 2, 4, 2, vocab_size=300))
NEW = 5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    made = random_model.build_model(TINY, hardware.plan("cpu"))
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def work() -> latency.Workload:
    return latency.Workload(latency.picture_bytes(None), latency.prompt_ids(11, 300), batch=2, new_tokens=NEW)


@pytest.mark.parametrize("spec", ["none", "prumerge+(tokens=12)", "grid(tokens=4)", "divprune(tokens=6)"])
def test_what_is_timed_is_what_generate_does(model, work, spec):
    reducer = build_reducer(spec)
    one = latency.run_once(model, reducer, work)
    assert set(one.ms) == {*latency.STAGES, *latency.TOTALS}

    model.set_reducer(spec)
    image = latency.load_image(work.picture)
    pixels = process_images([image] * 2, model.get_vision_tower().image_processor, model.config)
    expected = model.generate(
        work.prompt.expand(2, -1), images=pixels, do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )
    assert one.answers.tolist() == expected.tolist()
    assert [one.visual_tokens] * 2 == list(map(len, model.encode_images(pixels)))


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_flops_and_cache_of_every_language_model(model_type):
    """Against torch's own counter, which counts products only, and the cache that the model returns."""
    from torch.utils.flop_counter import FlopCounterMode

    text_type = LANGUAGE_MODELS[model_type].text_config_class.model_type
    # Heads wider than the hidden size where the model allows it.
    head_dim = None if text_type == "qwen2" else 32
    language = LanguageShape(64, 96, 2, 4, 2, 300, model_type=text_type, head_dim=head_dim)
    made = random_model.build_model(Shape(TOWER, language), hardware.plan("cpu", attention="eager"))
    assert type(made) is LANGUAGE_MODELS[model_type]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = made(inputs_embeds=torch.randn(1, 40, 64), logits_to_keep=1, use_cache=True)
    for shape in (language, made.config):
        assert latency.prefill_flops(shape, 40) == pytest.approx(counter.get_total_flops(), rel=0.03)
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
        assert roofline.kv_bytes(shape, 40, 1, width=4) == cached


def test_runs_take_turns_and_warm_up_is_thrown_away():
    said = []

    def run(name):
        said.append(name)
        return f"{name}{said.count(name)}"

    kept = latency.interleave([lambda: run("A"), lambda: run("B")], 2, "test")
    first = latency.WARMUP + 1
    assert said == ["A", "B"] * (latency.WARMUP + 2)
    assert kept == [[f"{name}{first}", f"{name}{first + 1}"] for name in "AB"]


def round_of(prefill: float, request: float, visual: int) -> latency.Round:
    ms = dict.fromkeys((*latency.STAGES, *latency.TOTALS), 1.0)
    return latency.Round(
        ms | {"prefill": prefill, "vision": 10.0, "request": request}, visual, torch.zeros(1, NEW), None
    )


def test_summary(model):
    work = latency.Workload(b"", latency.prompt_ids(10, 300), 1, NEW)
    dense = [round_of(100, 120, 36), round_of(200, 240, 36), round_of(400, 900, 36)]
    few = [round_of(50, 60, 8), round_of(50, 80, 8), round_of(50, 60, 8)]
    result = latency.summarise("few", few, dense, work, model)
    assert result.prefill_speedup == 4  # the median of the paired ratios 2, 4, 8
    assert result.request_speedup == 3  # of 2, 3, 15
    assert result.stages["prefill"] == Spread(50, 50) and result.stages["request"].p50 == 60
    assert result.reducer_share == 0.1
    assert 46 / 18 < result.flop_ratio < (46 / 18) ** 2


def test_the_clock_stops_between_stages():
    ticks = iter(range(100))
    watch = Stopwatch(torch.device("cpu"), clock=lambda: next(ticks))
    with watch.stage("a"):
        next(ticks)
    with watch.stage("b"):
        pass
    assert watch.ms == {"a": 2000, "b": 1000}


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(random_model, "memory_of", lambda device: 8e9)
    with pytest.raises(UserError, match="--layers"):
        random_model.build_model(SHAPES["7b"], hardware.plan("cpu"))


def run(flags: str, *more) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args([*flags.split(), *map(str, more)]))


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.delenv("LLAVA_DTYPE", raising=False)


def test_requests(tiny_shapes, tmp_path, capsys):
    report, chart = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    flags = "--shape tiny --random-weights --device cpu --batch 1 2 --rounds 2 --new-tokens 3"
    assert run(flags, "--reducer", "grid(tokens=4)", "--out", report, "--plot", chart) == 0
    said = capsys.readouterr().out
    for word in (*latency.STAGES, "grid(tokens=4)", "batch 2", "KV cache"):
        assert word in said
    written = json.loads(report.read_text())
    rows = [(row["batch"], row["reducer"], row["visual_tokens"]) for row in written["results"]]
    assert rows == [(b, *way) for b in (1, 2) for way in (("none", 36), ("grid(tokens=4)", 4))]
    assert all(row["prefill_speedup"] == 1 for row in written["results"] if row["reducer"] == "none")
    assert written["dtype"] == "float32" and written["random_weights"]
    assert chart.stat().st_size > 5000


def test_prefill_alone(tiny_shapes, capsys):
    assert run("--shape tiny --device cpu --prefill 60 20 --rounds 2 --json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in report["prefill"]] == [60, 20]
    assert report["prefill"][0]["speedup"] == report["prefill"][0]["flop_ratio"] == 1
    assert report["prefill"][1]["flop_ratio"] > 3


def test_the_tower_alone(tiny_shapes, capsys):
    flags = "--shape tiny --tower --device cpu --batch 1 3 --rounds 2 --json --reducer topk(tokens=4)"
    assert run(flags) == 0
    rows = json.loads(capsys.readouterr().out)["tower"]
    assert [row["batch"] for row in rows] == [1] * 4 + [3] * 4
    assert rows[-1]["name"] == "topk(tokens=4)"
    assert [row["speedup"] == 1 for row in rows] == [row["name"] == "all blocks" for row in rows]


def test_a_checkpoint_is_measured_as_it_is(tiny, capsys):
    flags = f"--model-path {tiny.full} --device cpu --rounds 1 --new-tokens 2 --json --reducer grid(tokens=4)"
    assert run(flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["random_weights"] and report["model"] == tiny.full.name
    assert [row["reducer"] for row in report["results"]] == ["none", "grid(tokens=4)"]


def test_the_papers_lengths_by_measurement(tiny_shapes, capsys):
    assert run("--shape tiny --paper --device cpu --rounds 1") == 0
    said = capsys.readouterr().out
    assert " 700 " in said and " 70 " in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--shape"),
        ("--shape tiny --model-path x", "--model-path"),
        ("--model-path x --layers 2", "--layers"),
        ("--shape tiny --layers 0", "--layers"),
        ("--shape tiny --reducer prumerg", "prumerge"),
        ("--shape tiny --batch 0", "--batch"),
        ("--shape tiny --image nowhere.png", "nowhere.png"),
        ("--shape tiny --device cpu --attention flash_attention_2", "CUDA"),
    ],
)
def test_bad_arguments(tiny_shapes, flags, words):
    with pytest.raises(UserError, match=words):
        run(flags)
