"""scripts/bench_eval.py: its ways answer alike, factors multiply, little of what is computed is padding."""

import importlib.util
import math
import sys

import pytest
import torch
from PIL import Image
from tiny_checkpoints import family

from llava.errors import UserError
from llava.eval.predict import Answerer, Generation, Request
from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def bench(root):
    spec = importlib.util.spec_from_file_location("bench_eval", root / "scripts/bench_eval.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ways_answer_alike_and_factors_multiply(bench, tmp_path):
    checkpoint = family(tmp_path).full
    requests = []
    for number in range(2):
        pixels = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(number)) * 255
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"{number}.png")
        for turn in range(18):
            text = f"{turn}: " + "is it " * (turn % 4)
            requests.append(Request(18 * number + turn, text, tmp_path / f"{number}.png", text))
    answerer, packed = (
        Answerer(model, tokenizer, image_processor, "vicuna_v1", Generation(max_new_tokens=3))
        for tokenizer, model, image_processor, _ in (
            load_pretrained_model(checkpoint, device="cpu", packed=packed) for packed in (False, True)
        )
    )
    results = bench.measure(answerer, packed, requests, ["prumerge", "none"], 1, 3, bench.CLOCKS["cpu"])
    assert bench.disagreements(results) == 0
    assert len(results[-1].answers) == 36 and len(set(results[-1].answers.values())) > 5
    rows = bench.report(results)
    ways = [(row["reducer"], row["way"]) for row in rows]
    assert ways[:2] == [("none", "one at a time"), ("prumerge", "fewer tokens")] and len(ways) == 10
    ladder = [row for row in rows if row["reducer"] == "prumerge"]
    for row, upto in zip(ladder, range(1, 6), strict=True):
        product = math.prod(one["factor"] for one in ladder[:upto])
        assert math.isclose(row["against_one_at_a_time"], product)
        assert math.isclose(row["against_one_at_a_time_with_this_reducer"], product / ladder[0]["factor"])
    # The check can fail.
    results[2].answers[0] += "!"
    assert bench.disagreements(results) == 1


def test_little_of_a_benchmark_is_padding(bench):
    for row in bench.padding_report(8192):
        assert 0 <= row["both"] < 0.05, row
        assert row["questions"] > 0  # lengths differ, so there is some


def test_a_processor_clock_measures_no_gpu(bench):
    with pytest.raises(UserError, match="--clock wall"):
        bench.main(["--clock", "cpu", "--device", "cuda"])
