"""`llava bench` times the real way of a request, in turn, and its sums are right. No test looks at a time."""

import argparse
import json

import pytest
import torch

from llava import hardware
from llava.analysis import bench, latency, random_model
from llava.analysis.shapes import SHAPES, LanguageShape, Shape, TowerShape
from llava.analysis.stopwatch import Spread, Stopwatch, peak_memory, reset_peak_memory
from llava.errors import UserError
from llava.mm_utils import process_images
from llava.reducers import build_reducer

TINY = Shape(
    "tiny",
    TowerShape("clip", hidden=32, intermediate=48, layers=3, heads=2, patch=14, image=84),
    LanguageShape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=300),
)
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


@pytest.mark.parametrize("spec", ["none", "prumerge+(tokens=12)", "grid(tokens=4)"])
def test_what_is_timed_is_what_generate_does(model, work, spec):
    reducer = build_reducer(spec)
    one = latency.run_once(model, model.get_vision_tower().image_processor, reducer, work)
    assert set(one.ms) == set(latency.STAGES)

    model.set_reducer(spec)
    image = latency.load_image(work.picture)
    pixels = process_images([image] * 2, model.get_vision_tower().image_processor, model.config)
    expected = model.generate(
        work.prompt.expand(2, -1), images=pixels, do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )
    assert one.answers.tolist() == expected.tolist()
    assert one.visual_tokens == tuple(map(len, model.encode_images(pixels)))


def test_padded_batches_decode_as_single_requests_do(model):
    """A reducer whose counts differ between the pictures of a batch makes left padding."""

    class Uneven:
        """Keeps 3 patches of the first picture, 7 of the second, and so on."""

        name = spec = "uneven"

        def __call__(self, features):
            everything = build_reducer("none")(features)

            class Cut:
                def unbind(self):
                    return [tokens[: 3 + 4 * row] for row, tokens in enumerate(everything.tokens)]

            return Cut()

    processor = model.get_vision_tower().image_processor
    prompt = latency.prompt_ids(6, 300)
    both = latency.run_once(
        model, processor, Uneven(), latency.Workload(latency.picture_bytes(None), prompt, 2, NEW)
    )
    first = latency.run_once(
        model, processor, Uneven(), latency.Workload(latency.picture_bytes(None), prompt, 1, NEW)
    )
    assert both.visual_tokens == (3, 7)
    assert both.answers[0].tolist() == first.answers[0].tolist()
    result = latency.summarise("uneven", [both], [both], latency.Workload(b"", prompt, 2, NEW), model)
    assert result.padding == pytest.approx(4 / 26)


def test_cache_bytes_are_exact(model, work):
    one = latency.run_once(
        model, model.get_vision_tower().image_processor, build_reducer("grid(tokens=4)"), work
    )
    output = model(inputs_embeds=torch.zeros(2, 11 + 4, 64), use_cache=True)
    layers = output.past_key_values.layers
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert latency.summarise("grid", [one], [one], work, model).kv_bytes == expected


def test_runs_take_turns_and_warm_up_is_thrown_away():
    said = []

    def run(name):
        def once():
            said.append(name)
            return f"{name}{said.count(name)}"

        return once

    kept = latency.interleave([run("A"), run("B")], rounds=2, warmup=1)
    assert said == ["A", "B"] * 3
    assert kept == [["A2", "A3"], ["B2", "B3"]]


def round_of(prefill: float, vision: float, visual: int) -> latency.Round:
    ms = dict.fromkeys(latency.STAGES, 1.0) | {"prefill": prefill, "vision": vision, "decode-token": 2.0}
    return latency.Round(ms, (visual,), torch.zeros(1, NEW), None)


def test_summary(model):
    work = latency.Workload(b"", latency.prompt_ids(10, 300), 1, NEW)
    dense = [round_of(100, 10, 36), round_of(200, 10, 36), round_of(400, 10, 36)]
    few = [round_of(50, 10, 8), round_of(50, 10, 8), round_of(50, 10, 8)]
    result = latency.summarise("few", few, dense, work, model)
    assert result.prefill_speedup == 4  # the median of the paired ratios 2, 4, 8
    assert result.first_token.p50 == 50 + 10 + 4
    assert result.request.p50 == 64 + (NEW - 1) * 2
    assert result.request_speedup == pytest.approx((200 + 14 + 8) / 72)
    assert result.stages["prefill"] == Spread(50, 50)
    assert result.padding == 0 and result.reducer_share == 0.1
    assert 46 / 18 < result.flop_ratio < (46 / 18) ** 2
    assert result.roofline_prefill_ms is None and result.peak_bytes is None


def test_flops_are_those_of_the_model():
    """Against torch's own counter, which counts products only."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    plan = hardware.plan("cpu", attention="eager")
    model = random_model.build_model(TINY, plan, with_tower=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 40, 64), logits_to_keep=1)
    assert latency.prefill_flops(TINY.language, 40) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_clock_stops_between_stages():
    ticks = iter(range(100))
    watch = Stopwatch(torch.device("cpu"), clock=lambda: next(ticks))
    with watch.stage("a"):
        next(ticks)
    with watch.stage("b"):
        pass
    assert watch.ms == {"a": 2000, "b": 1000}


def test_peak_memory_sees_a_tensor_come_and_go():
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    if before is None:
        pytest.skip("this system does not say")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert peak_memory(device) >= before + (48 << 20)


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(random_model, "_free_memory", lambda device: 8e9)
    with pytest.raises(UserError, match="--layers"):
        random_model.build_model(SHAPES["7b"], hardware.plan("cpu"))


def test_layers():
    assert random_model.with_layers(SHAPES["7b"], 3).language.layers == 3
    assert random_model.with_layers(SHAPES["7b"], None) is SHAPES["7b"]
    with pytest.raises(UserError, match="32"):
        random_model.with_layers(SHAPES["7b"], 33)


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.delenv("LLAVA_DTYPE", raising=False)


def test_the_command(tiny_shapes, tmp_path, capsys):
    report, chart = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    assert (
        run(
            *("--shape", "tiny", "--random-weights", "--device", "cpu", "--reducer", "grid(tokens=4)"),
            *("--batch", "1", "2", "--rounds", "2", "--warmup", "0", "--new-tokens", "3"),
            *("--out", report, "--plot", chart),
        )
        == 0
    )
    said = capsys.readouterr().out
    for word in (*latency.STAGES, "grid(tokens=4)", "batch 2", "KV cache"):
        assert word in said
    written = json.loads(report.read_text())
    assert [(row["batch"], row["reducer"]) for row in written["results"]] == [
        (1, "none"),
        (1, "grid(tokens=4)"),
        (2, "none"),
        (2, "grid(tokens=4)"),
    ]
    assert all(row["prefill_speedup"] == 1 for row in written["results"] if row["reducer"] == "none")
    assert written["dtype"] == "float32" and written["random_weights"]
    assert chart.stat().st_size > 5000


def test_prefill_alone(tiny_shapes, capsys):
    arguments = (
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--prefill",
        60,
        20,
        "--rounds",
        2,
        "--warmup",
        0,
        "--json",
    )
    assert run(*arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in report["prefill"]] == [60, 20]
    assert report["prefill"][0]["speedup"] == report["prefill"][0]["flop_ratio"] == 1
    assert report["prefill"][1]["flop_ratio"] > 3


def test_the_tower_alone(tiny_shapes, capsys):
    arguments = ("--shape", "tiny", "--tower", "--device", "cpu", "--batch", 1, 3, "--rounds", 2, "--json")
    assert run(*arguments, "--reducer", "topk(tokens=4)") == 0
    rows = json.loads(capsys.readouterr().out)["tower"]
    assert [row["batch"] for row in rows] == [1] * 4 + [3] * 4
    assert rows[-1]["way"] == "topk(tokens=4)"
    assert [row["part"] == 1 for row in rows] == [row["way"] == "all blocks" for row in rows]


def test_the_papers_lengths_by_measurement(tiny_shapes, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "7b", TINY)
    assert run("--shape", "7b", "--paper", "--device", "cpu", "--rounds", 1, "--warmup", 0) == 0
    said = capsys.readouterr().out
    assert " 700 " in said and " 70 " in said and "88.6 and 15.3" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--shape"),
        (("--shape", "tiny", "--model-path", "x"), "--model-path"),
        (("--model-path", "x", "--layers", 2), "--layers"),
        (("--shape", "tiny", "--reducer", "prumerg"), "prumerge"),
        (("--shape", "tiny", "--batch", 0), "--batch"),
        (("--shape", "tiny", "--rounds", 0), "--rounds"),
        (("--shape", "tiny", "--image", "nowhere.png"), "nowhere.png"),
        (("--shape", "tiny", "--device", "cpu", "--attention", "flash_attention_2"), "CUDA"),
    ],
)
def test_bad_arguments(tiny_shapes, arguments, words):
    with pytest.raises(UserError, match=words):
        run(*arguments)
