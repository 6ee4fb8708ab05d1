"""The roofline against the published tables, and against sums worked out by hand."""

import argparse
import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llava.analysis import gpus, paper_table, roofline, roofline_report
from llava.analysis.shapes import CLIP_L_336, SHAPES, LanguageShape, decoder_weights
from llava.errors import UserError

# The paper's table recomputed elsewhere at four digits: TFLOPs, prefill ms, memory GB, activation GB.
DECODED = {
    "7b-fp16-full": (9.328, 88.61, 23.35, 4.645),
    "7b-fp16-prumerge": (0.9095, 15.28, 13.75, 0.284),
    "7b-int4-full": (2.332, 151.6, 5.935, 1.161),
    "7b-int4-prumerge": (0.2274, 14.87, 3.535, 0.0710),
    "13b-fp16-full": (18.17, 170.5, 41.59, 7.265),
    "13b-fp16-prumerge": (1.781, 29.53, 26.58, 0.444),
    "13b-int4-full": (4.543, 294.9, 10.52, 1.816),
    "13b-int4-prumerge": (0.4452, 28.99, 6.768, 0.111),
}

# Corrected model, 7B FP16, 40 text tokens, batch 1: prefill ms at SWEEP, then the break-even length.
VISUAL = (576, 144, 64, 40, 32)
CORRECTED = {
    "V100": ((76.9, 22.9, 15.9, 15.6, 15.5), 124),
    "A100-80G": ((28.1, 8.3, 7.0, 6.9, 6.9), 153),
    "H100": ((9.6, 4.6, 4.3, 4.2, 4.2), 295),
    "RTX 4090": ((53.4, 15.8, 14.2, 14.0, 13.9), 164),
    "A6000": ((58.2, 19.9, 18.7, 18.3, 18.2), 202),
}


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    roofline_report.add_arguments(parser)
    return roofline_report.run(parser.parse_args(arguments))


def test_paper_json_has_the_rows_and_keys(capsys):
    assert run("--paper", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in rows] == list(DECODED)
    for row in rows:
        assert set(row) == {"row", "tflops", "prefill_ms", "memory_gb", "activation_gb"}
        found = (row["tflops"], row["prefill_ms"], row["memory_gb"], row["activation_gb"])
        assert found == pytest.approx(DECODED[row["row"]], rel=1.2e-3), row["row"]


def test_paper_cells_as_printed():
    """All cells round to what is printed, but the slip and the figure that was rounded twice."""
    odd = []
    for row in paper_table.compute():
        values = (row.tflops, row.prefill_ms, row.memory_gb, row.activation_gb)
        for column, (value, printed) in enumerate(zip(values, paper_table.PRINTED[row.row], strict=True)):
            significant = printed.rstrip("0").rstrip(".")  # 4.60 stands for 4.645: the zero is not a digit
            decimals = len(significant.partition(".")[2])
            if f"{value:.{decimals}f}" != significant:
                odd.append((row.row, column))
    assert odd == [("7b-int4-prumerge", 0), ("13b-int4-full", 0)]


def request(name, visual, *, text=40, batch=1, precision="fp16"):
    gpu, width = gpus.find_gpu(name), roofline.PRECISIONS[precision]
    return roofline.request(SHAPES["7b"], gpu, text=text, visual=visual, batch=batch, width=width)


@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_prefill(name):
    prefill, break_even = CORRECTED[name]
    for visual, expected in zip(VISUAL, prefill, strict=True):
        assert request(name, visual).prefill.ms == pytest.approx(expected, abs=0.06), visual
    assert roofline.break_even(gpus.find_gpu(name)) == pytest.approx(break_even, abs=0.5)


def test_weight_only_four_bits():
    times = [request("V100", visual, precision="w4a16").prefill.ms for visual in (576, 40, 32)]
    assert times == pytest.approx((76.7, 9.8, 8.9), abs=0.06)


@pytest.mark.parametrize(("name", "ms"), [("V100", 3.4), ("A100-80G", 1.2), ("H100", 0.4)])
def test_whole_tower(name, ms):
    operators = roofline.vision_operators(CLIP_L_336, 1, CLIP_L_336.num_hidden_layers)
    found = roofline.estimate(operators, gpus.find_gpu(name))
    assert found.ms == pytest.approx(ms, abs=0.05)
    assert found.tflops == pytest.approx(0.38, abs=0.005)


def test_prefill_flops_are_two_per_weight_and_token_and_the_attention():
    language = LanguageShape(64, 96, 3, 4, 2, vocab_size=100)
    tokens, batch = 10, 2
    weights = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
    attention = 4 * tokens**2 * 64 + 5 * tokens**2 * 4
    pointwise = tokens * (2 * 7 * 64 + 2 * 64 + 2 * 96)
    expected = batch * (3 * (2 * weights * tokens + attention + pointwise) + 2 * 64 * 100)
    operators = roofline.decoder_operators(language, tokens, tokens, batch)
    assert sum(operator.flops for operator in operators) == expected


# The parameters that the makers of these models publish.
PARAMETERS = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "yi-34b": 34_388_917_248,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "mini": 134_515_008,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models_of_that_name(name):
    """transformers' model of the shape has as many parameters as published; ours leaves out norms."""
    language = SHAPES[name].language
    fields = {field: value for field, value in asdict(language).items() if value is not None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert model.num_parameters() == PARAMETERS[name]
    tables = (2 - language.tie_word_embeddings) * language.vocab_size * language.hidden_size
    assert decoder_weights(language) + tables == pytest.approx(PARAMETERS[name], rel=1e-3)


def test_decoding_reads_every_weight_and_the_cache_once():
    language = SHAPES["7b"].language
    operators = roofline.decoder_operators(language, 1, 1000, 1)
    found = roofline.estimate(operators, gpus.find_gpu("A100-80G"))
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000)
    cache = 1000 * 2 * 32 * 4096 * 2
    assert roofline.kv_bytes(language, 1000, 1) == cache
    assert found.gigabytes == pytest.approx((weights + cache) / 1e9, rel=2e-3)
    assert found.bytes_share == pytest.approx(1.0)


def test_bound_changes_sides_at_the_break_even():
    text = 8
    edge = round(roofline.break_even(gpus.find_gpu("A100-80G"))) - text
    few, at_edge, many = (request("A100-80G", edge + more, text=text).prefill for more in (-60, 0, 60))
    assert few.bytes_share > 0.5 > many.bytes_share
    assert at_edge.ms / few.ms < 1.06  # below: next to nothing gained
    assert many.ms / at_edge.ms > 1.25  # above: time goes with tokens


def test_batches_restore_the_gain():
    speedup = {
        batch: request("H100", 576, batch=batch).prefill.ms / request("H100", 32, batch=batch).prefill.ms
        for batch in (1, 32)
    }
    assert speedup[1] < 2.5 < 8 < speedup[32]


def test_nothing_is_reduced_when_all_patches_stay():
    assert request("V100", 576).reduce.ms == 0 < request("V100", 144).reduce.ms


def test_gpu_json(capsys):
    assert run("--gpu", "v100", "--visual", "144", "32", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["gpu"]["name"] == "V100" and answer["break_even_visual"] == pytest.approx(84.4, abs=0.1)
    assert [row["visual"] for row in answer["rows"]] == [576, 144, 32]
    for row in answer["rows"]:
        parts = sum(row[stage]["ms"] for stage in ("vision", "reduce", "project", "prefill"))
        assert row["first_token_ms"] == pytest.approx(parts)
    assert answer["rows"][0]["prefill_speedup"] == 1


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [((), len(gpus.GPUS)), (("--gpu", "V100"), 5), (("--paper",), 8), (("--shape", "mini"), len(gpus.GPUS))],
)
def test_tables_for_people(arguments, rows, capsys):
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rule = next(index for index, line in enumerate(lines) if set(line) == {"-", " "})
    columns = len(lines[rule].split())
    table = [line for line in lines[rule + 1 :] if len(line.split("  ")) >= columns]
    assert len(table) == rows and max(map(len, lines)) < 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "Voodoo"), "RTX 4090"),
        (("--gpu", "V100", "--visual", "577"), "576"),
        (("--gpu", "V100", "--batch", "0"), "--batch"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        run(*arguments)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("a100-80g", "A100-80G"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A10G", None),
    ],
)
def test_gpus_are_found_by_either_name(said, name):
    assert name is None or gpus.find_gpu(said).name == name
    if name is None:
        with pytest.raises(ValueError, match="RTX 4090"):
            gpus.find_gpu(said)


def test_the_table_is_plausible():
    assert len({gpu.name for gpu in gpus.GPUS}) == len(gpus.GPUS)
    for gpu in gpus.GPUS:
        assert 3e11 <= gpu.bandwidth < 1e13 and 1e13 < gpu.half < 2e15 and gpu.source, gpu.name
