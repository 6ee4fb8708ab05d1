"""scripts/bench_eval.py: its ways answer alike, factors multiply, its start needs no preparation."""

import importlib.util
import math
import sys

import pytest
import torch
from PIL import Image

from llava.engine import ModelSource, Request
from llava.errors import UserError


@pytest.fixture(scope="module")
def bench(root):
    spec = importlib.util.spec_from_file_location("bench_eval", root / "scripts/bench_eval.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ways_answer_alike_and_factors_multiply(bench, tiny, tmp_path):
    requests = []
    for number in range(2):
        pixels = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(number)) * 255
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"{number}.png")
        for turn in range(18):
            text = f"{turn}: " + "is it " * (turn % 4)
            images = (tmp_path / f"{number}.png",)
            requests.append(Request(id=18 * number + turn, text=text, images=images, max_new_tokens=3))
    engine = ModelSource(str(tiny.full), conv_mode="vicuna_v1", device="cpu").load()
    results = bench.measure(engine, requests, ["prumerge", "none"], 1, 3, bench.CLOCKS["cpu"])
    assert bench.disagreements(results) == 0
    assert len(results[-1].answers) == 36 and len(set(results[-1].answers.values())) > 5
    rows = bench.report(results)
    ways = [(row["reducer"], row["way"]) for row in rows]
    assert ways[:2] == [("none", "one at a time"), ("prumerge", "fewer tokens")] and len(ways) == 8
    ladder = [row for row in rows if row["reducer"] == "prumerge"]
    for row, upto in zip(ladder, range(1, 5), strict=True):
        product = math.prod(one["factor"] for one in ladder[:upto])
        assert math.isclose(row["against_one_at_a_time"], product)
        assert math.isclose(row["against_one_at_a_time_with_this_reducer"], product / ladder[0]["factor"])
    # The check can fail.
    results[2].answers[0] += "!"
    assert bench.disagreements(results) == 1


def test_a_processor_clock_measures_no_gpu(bench):
    with pytest.raises(UserError, match="--clock wall"):
        bench.main(["--clock", "cpu", "--device", "cuda"])


def test_it_makes_its_questions_before_it_loads_a_model(bench, tmp_path, monkeypatch):
    """The documented command on a machine that has only the code: it fails at the model, not at the data."""
    questions, out, generate = tmp_path / "eval-mini", tmp_path / "nowhere", bench.generate
    monkeypatch.setattr(bench, "generate", lambda root, seed, number: generate(root, seed, 2))
    command = ["--root", str(questions), "--model-path", str(out), "--model-base", "", "--images", "2"]
    with pytest.raises(UserError, match=str(out)):
        bench.main(command)
    args = bench.parser().parse_args(command)
    requests = bench.read_requests(args)
    assert len(requests) == 36 and len({request.images for request in requests}) == 2
    args.root = tmp_path
    with pytest.raises(UserError, match="llava mini benchmarks"):
        bench.read_requests(args)
