"""The tools: what they write is the same model, read by us and by transformers."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    IMAGE_SIZE,
    VISUAL_TOKENS,
    edit_json,
    single_safetensors,
)

from llava.cli import main
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints import inspect_checkpoint, read_model_weights, read_projector

PROMPT = torch.tensor([[1, 270, 280, -200, 290, 300]])


def tool(*words: str | Path) -> int:
    return main([str(word) for word in words])


def merge(path: Path, base: Path, out: Path, *more: str) -> int:
    return tool("tools", "merge-lora", "--model-path", path, "--model-base", base, "--out", out, *more)


def convert(to: str, path: Path, out: Path, *more: str) -> int:
    return tool("tools", "convert", "--to", to, "--model-path", path, "--out", out, *more)


def load(path: Path, base: Path | None = None):
    return load_pretrained_model(path, base, "any-name", device="cpu")


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(path: Path, base: Path | None = None) -> torch.Tensor:
    return load(path, base)[1](PROMPT, images=pixels()).logits


# Merging


def test_merge_lora(tiny):
    out = tiny.root / "out/merged"
    assert merge(tiny.lora, tiny.base, out) == 0
    assert inspect_checkpoint(out).kind == "full"
    assert (out / "model.safetensors").is_file()
    torch.testing.assert_close(logits(out), logits(tiny.lora, tiny.base), atol=1e-6, rtol=0)


def test_merge_keeps_dtype_unless_told(tiny):
    half = {name: tensor.half() for name, tensor in tiny.language_model.items()}
    torch.save(half, tiny.base / "pytorch_model.bin")
    merge(tiny.lora, tiny.base, tiny.root / "a")
    merge(tiny.lora, tiny.base, tiny.root / "b", "--dtype", "float32")
    for name, dtype in (("a", torch.float16), ("b", torch.float32)):
        assert {tensor.dtype for tensor in load_file(tiny.root / name / "model.safetensors").values()} == {
            dtype
        }
        assert json.loads((tiny.root / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix(
            "torch."
        )


def test_merge_projector_into_its_base(tiny):
    merge(tiny.projector, tiny.base, tiny.root / "out")
    assert torch.equal(logits(tiny.root / "out"), logits(tiny.full))


def test_merge_adapter_of_a_plain_language_model(tiny):
    for name in ("config.json", "non_lora_trainables.bin"):
        (tiny.lora / name).unlink()
    out = tiny.root / "out"
    assert merge(tiny.lora, tiny.base, out) == 0
    assert inspect_checkpoint(out).kind == "plain_lm"
    ids = PROMPT[:, :3]
    expected = load(tiny.lora, tiny.base)[1](ids).logits
    torch.testing.assert_close(load(out)[1](ids).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "words",
    [
        ("merge-lora", "--model-path", "llava-tiny", "--out"),
        ("extract-projector", "--model-path", "base-tiny", "--output"),
        ("consolidate", "--src", "llava-tiny-lora", "--dst"),
    ],
)
def test_checkpoints_that_a_tool_is_not_for(tiny, words, capsys, monkeypatch):
    monkeypatch.chdir(tiny.root)
    edit_json(tiny.lora / "adapter_config.json", base_model_name_or_path="base-tiny")
    assert tool("tools", *words, "out.bin") == 2
    assert words[2] in capsys.readouterr().err
    assert not (tiny.root / "out.bin").exists()


def test_a_failed_tool_leaves_nothing(tiny, capsys):
    (tiny.base / "pytorch_model.bin").write_bytes(b"PK torn")
    assert merge(tiny.lora, tiny.base, tiny.root / "out") == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert not list(tiny.root.glob("*out*"))


# The way to the tower


def test_relative_tower_paths_move_along(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    near, far = tiny.root / "other", tmp_path.parent / f"{tmp_path.name}-far/out"
    for out, is_kept in ((near, True), (far, False)):
        tool("tools", "consolidate", "--src", tiny.full, "--dst", out, "--dtype", "float32")
        assert (load(out)[1].config.mm_vision_tower == "towers/clip-tiny") == is_kept
        assert torch.equal(logits(out), logits(tiny.full))
    shutil.rmtree(far.parent)


# Extracting


@pytest.mark.parametrize("source", ["full", "lora", "projector"])
def test_extract_projector(tiny, source):
    for name in ("mm_projector.bin", "mm_projector.safetensors"):
        out = tiny.root / "out" / name
        assert tool("tools", "extract-projector", "--model-path", getattr(tiny, source), "--output", out) == 0
        found = read_projector(out).tensors
        assert found.keys() == tiny.projector_weights.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tiny.projector_weights.items())


def test_extracted_projector_is_a_checkpoint(tiny):
    out = tiny.root / "out"
    tool("tools", "extract-projector", "--model-path", tiny.full, "--output", out)
    assert inspect_checkpoint(out).kind == "projector"
    assert torch.equal(logits(out, tiny.base), logits(tiny.full))


# Consolidating


def test_consolidate(tiny):
    tower = {
        f"model.vision_tower.vision_tower.{name}": tensor
        for name, tensor in torch.load(tiny.tower / "pytorch_model.bin").items()
        if name.startswith("vision_model.")
    }
    whole = {**tiny.language_model, **tiny.projector_weights}
    single_safetensors(tiny.full, {**whole, **tower})
    out = tiny.root / "out"
    assert tool("tools", "consolidate", "--src", tiny.full, "--dst", out) == 0
    found = load_file(out / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in whole.items())
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= {
        file.name for file in out.iterdir()
    }

    edit_json(tiny.full / "config.json", unfreeze_mm_vision_tower=True)
    tool("tools", "consolidate", "--src", tiny.full, "--dst", tiny.root / "with-tower")
    assert load_file(tiny.root / "with-tower/model.safetensors").keys() == whole.keys() | tower.keys()


def test_a_tower_that_was_trained_along_is_merged_too(tiny):
    """LoRA on a LLaVA-1.6: its base carries a tower of its own."""
    clip = torch.load(tiny.tower / "pytorch_model.bin")
    own = {
        f"model.vision_tower.vision_tower.{name}": 0.5 * tensor
        for name, tensor in clip.items()
        if name.startswith("vision_model.")
    }
    single_safetensors(tiny.full, {**tiny.language_model, **tiny.projector_weights, **own})
    for directory in (tiny.full, tiny.lora):
        edit_json(directory / "config.json", unfreeze_mm_vision_tower=True)
    expected = logits(tiny.lora, tiny.full)
    merge(tiny.lora, tiny.full, tiny.root / "merged")
    torch.testing.assert_close(logits(tiny.root / "merged"), expected, atol=1e-5, rtol=0)
    convert("llava-hf", tiny.root / "merged", tiny.root / "hf")
    torch.testing.assert_close(logits(tiny.root / "hf"), expected, atol=1e-5, rtol=0)


# llava-hf


def test_to_llava_hf_is_transformers_llava(tiny):
    """The same picture and text through transformers' own model, read from what we wrote."""
    from transformers import LlamaTokenizer, LlavaForConditionalGeneration

    edit_json(tiny.full / "config.json", mm_token_reducer="none")
    out = tiny.root / "hf"
    assert convert("llava-hf", tiny.full, out) == 0
    model, report = LlavaForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    image_token = model.config.image_token_index
    assert (
        LlamaTokenizer.from_pretrained(out).convert_tokens_to_ids("<image>") == image_token == tiny.vocab_size
    )
    before, after = PROMPT[0, :3].tolist(), PROMPT[0, 4:].tolist()
    ids = torch.tensor([[*before, *[image_token] * VISUAL_TOKENS, *after]])
    with torch.inference_mode():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels()).logits
    assert theirs.shape[-1] % 64 == 0
    torch.testing.assert_close(theirs[..., : tiny.vocab_size], logits(tiny.full), atol=1e-5, rtol=0)


def test_llava_hf_round_trip(tiny):
    edit_json(tiny.full / "config.json", mm_token_reducer="topk(tokens=5)", image_aspect_ratio="square")
    hf, back = tiny.root / "hf", tiny.root / "back"
    convert("llava-hf", tiny.full, hf)
    assert inspect_checkpoint(hf).kind == "llava_hf"
    expected = logits(tiny.full)
    assert torch.equal(logits(hf), expected)

    shutil.rmtree(tiny.root / "towers")
    convert("llava", hf, back)
    assert inspect_checkpoint(back).kind == "full"
    found = read_model_weights(inspect_checkpoint(back)).tensors
    whole = {**tiny.language_model, **tiny.projector_weights}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert torch.equal(logits(back), expected)
    tokenizer, model, *_ = load(back)
    assert len(tokenizer) == tiny.vocab_size
    assert (model.reducer.spec, model.config.image_aspect_ratio) == ("topk(tokens=5)", "square")

    again = tiny.root / "again"
    convert("llava-hf", back, again)
    first, second = load_file(hf / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_convert_golden_llava_hf(golden, tmp_path):
    """A 4.37-era directory becomes the released format's weights, and its tower the CLIP they came from."""
    ckpt = golden / "llava/ckpt"
    out = tmp_path / "llava"
    convert("llava", ckpt / "llava-tiny-1.5-7b-hf", out)
    found = read_model_weights(inspect_checkpoint(out)).tensors
    expected = read_model_weights(inspect_checkpoint(ckpt / "llava-tiny-v1.5-7b")).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    clip = torch.load(ckpt / "clip-tiny-336/pytorch_model.bin")
    tower = load_file(out / "vision_tower/model.safetensors")
    assert tower.keys() == {
        name for name in clip if name.startswith("vision_model.") and "position_ids" not in name
    }
    assert all(torch.equal(tower[name], clip[name]) for name in tower)


def test_convert_with_a_named_tower(tiny):
    hf, out = tiny.root / "hf", tiny.root / "out"
    convert("llava-hf", tiny.full, hf)
    convert("llava", hf, out, "--vision-tower", "towers/clip-tiny")
    assert not (out / "vision_tower").exists()
    assert torch.equal(logits(out), logits(tiny.full))


def test_what_llava_hf_has_no_place_for(tiny, capsys):
    edit_json(tiny.full / "config.json", mm_projector_type="linear")
    weights = {
        **tiny.language_model,
        "model.mm_projector.weight": torch.zeros(64, 32),
        "model.mm_projector.bias": torch.zeros(64),
    }
    single_safetensors(tiny.full, weights)
    assert convert("llava-hf", tiny.full, tiny.root / "out") == 2
    assert "linear" in capsys.readouterr().err
    assert convert("llava-hf", tiny.base, tiny.root / "out") == 2
    assert "base-tiny" in capsys.readouterr().err
    assert not (tiny.root / "out").exists()


# Doctor


def doctor(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict]:
    status = tool("doctor", "checkpoint", *words, "--json")
    return status, json.loads(capsys.readouterr().out)


def test_doctor_finds_nothing_wrong(tiny, capsys):
    for directory, base in (
        (tiny.full, None),
        (tiny.lora, tiny.base),
        (tiny.projector, tiny.base),
        (tiny.base, None),
        (tiny.tower, None),
    ):
        status, report = doctor(capsys, directory, *(["--model-base", base] if base else []), "--deep")
        assert (status, report["problems"]) == (0, [])
        assert report["values"] == "finite"


def test_doctor_lists_what_is_wrong(tiny, capsys):
    status, report = doctor(capsys, tiny.lora)
    assert status == 1
    assert "--model-base someone/base-tiny" in report["problems"][0]

    edit_json(tiny.full / "config.json", mm_vision_tower="openai/nowhere", hidden_size=32)
    (tiny.full / "tokenizer.json").unlink()
    status, report = doctor(capsys, tiny.full)
    assert status == 1
    tokenizer, tower, weights = report["problems"]
    assert "tokenizer.json" in tokenizer and "openai/nowhere" in tower and "[" in weights


def test_doctor_reads_the_values_if_asked(tiny, capsys):
    file = tiny.projector / "mm_projector.bin"
    weights = torch.load(file)
    weights["model.mm_projector.0.bias"][3] = float("nan")
    torch.save(weights, file)
    assert doctor(capsys, tiny.projector, "--model-base", tiny.base)[0] == 0
    status, report = doctor(capsys, tiny.projector, "--model-base", tiny.base, "--deep")
    assert status == 1
    assert "mm_projector.0.bias" in report["problems"][0]


# Old names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llava.model.consolidate", "--src"),
        ("scripts/merge_lora_weights.py", "--save-model-path"),
        ("scripts/extract_mm_projector.py", "--output"),
    ],
)
def test_old_names(root, name, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        if name.endswith(".py"):
            runpy.run_path(str(root / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__")
    assert not stopped.value.code
    assert says in capsys.readouterr().out
