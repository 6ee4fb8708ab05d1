"""LLaVA on every language model of the table: the ids transformers' own classes give, and training."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    HIDDEN,
    IMAGE_SIZE,
    LANGUAGE_MODEL,
    TOWER,
    VISUAL_TOKENS,
    edit_json,
    write_tokenizer,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llava.cli import main
from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints import inspect_checkpoint, llava_config_dict
from llava.model.llava_arch import LANGUAGE_MODELS, language_model_of
from llava.model.load import build_config

TEXT_TYPES = {name: our.text_config_class.model_type for name, our in LANGUAGE_MODELS.items()}
BEFORE, AFTER = [1, 40, 50], [60, 70]


def draw(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights large enough that what it says depends on the picture."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def byte_level_tokenizer(directory: Path) -> int:
    """A byte-level BPE of 256 bytes, as Qwen's is without its merges; returns its length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]})
    fast.save_pretrained(directory)
    return len(fast)


def tokenizer_for(text_type: str) -> Callable[[Path], int]:
    """What writes the tokenizer of its family."""
    return byte_level_tokenizer if text_type.startswith("qwen") else write_tokenizer


def text_config(text_type: str, vocab_size: int, **more):
    settings = {**LANGUAGE_MODEL, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": vocab_size}
    return AutoConfig.for_model(text_type, **{**settings, "eos_token_id": None, **more})


def llava_hf(directory: Path, text_type: str, **text) -> PreTrainedModel:
    """transformers' own LLaVA with such a language model, saved with the tokenizer of its family."""
    directory.mkdir(parents=True)
    tokens = tokenizer_for(text_type)(directory)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(directory)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=text_config(text_type, tokens + 3, **text),
        image_token_index=tokens,
        image_seq_length=VISUAL_TOKENS,
    )
    model = draw(LlavaForConditionalGeneration(config))
    model.save_pretrained(directory)
    return model


def pixels(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def their_ids(model: PreTrainedModel, images: torch.Tensor) -> list[int]:
    image = [model.config.image_token_index] * VISUAL_TOKENS
    ids = torch.tensor([[*BEFORE, *image, *AFTER]])
    new = model.generate(
        input_ids=ids,
        pixel_values=images,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        # Our embeddings end before `<image>`.
        suppress_tokens=list(range(model.config.image_token_index, model.config.text_config.vocab_size)),
        pad_token_id=0,
    )
    return new[0, ids.shape[1] :].tolist()


def our_ids(path: Path, images: torch.Tensor, base: Path | None = None) -> list[int]:
    model = load_pretrained_model(path, base, device="cpu")[1]
    ids = torch.tensor([[*BEFORE, -200, *AFTER]])
    return model.generate(ids, images=images, do_sample=False, max_new_tokens=16, pad_token_id=0)[0].tolist()


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_greedy_ids_are_those_of_transformers_in_both_formats(tmp_path, model_type):
    hf, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    theirs = llava_hf(hf, TEXT_TYPES[model_type])
    expected = [their_ids(theirs, pixels(seed)) for seed in range(3)]
    assert len({tuple(ids) for ids in expected}) == 3, "what is said has to depend on the picture"
    assert [our_ids(hf, pixels(seed)) for seed in range(3)] == expected

    assert main(["tools", "convert", "--to", "llava", "--model-path", str(hf), "--out", str(ours)]) == 0
    config = json.loads((ours / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config["architectures"] == [LANGUAGE_MODELS[model_type].__name__]
    assert our_ids(ours, pixels(0)) == expected[0]

    assert main(["tools", "convert", "--to", "llava-hf", "--model-path", str(ours), "--out", str(back)]) == 0
    again, report = LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.text_config.model_type == TEXT_TYPES[model_type]
    assert their_ids(again, pixels(0)) == expected[0]


def test_tied_embeddings_of_llava_hf(tmp_path):
    """As small Qwen2 have them: then the files hold no head."""
    theirs = llava_hf(tmp_path / "hf", "qwen2", tie_word_embeddings=True)
    assert not any("lm_head" in name for name in load_file(tmp_path / "hf/model.safetensors"))
    assert our_ids(tmp_path / "hf", pixels(0)) == their_ids(theirs, pixels(0))


@pytest.mark.parametrize("text_type", ["llama", "qwen2"])
def test_the_tokenizer_of_llava_hf_ends_before_its_image_token(tmp_path, text_type):
    """Also where transformers' own saving made it one of the generic kind, and after it was saved again."""
    hf, ours = tmp_path / "hf", tmp_path / "ours"
    rows = llava_hf(hf, text_type).config.image_token_index
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(hf)
    edit_json(hf / "tokenizer_config.json", extra_special_tokens={"image_token": "<image>"})
    main(["tools", "convert", "--to", "llava", "--model-path", str(hf), "--out", str(ours)])
    for directory in (hf, ours):
        found, model, *_ = load_pretrained_model(directory, device="cpu")
        assert len(found) == model.config.vocab_size == rows
        assert found.pad_token_id < rows


@pytest.mark.parametrize("text_type", ["mistral", "llama"])
def test_llava_next_of_transformers(tmp_path, text_type):
    """LLaVA-1.6 as transformers stores it: tiles, row ends, and a picture wider than it is high."""
    tokens = write_tokenizer(tmp_path)
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop).save_pretrained(tmp_path)
    height, width = IMAGE_SIZE, 2 * IMAGE_SIZE
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=text_config(text_type, tokens + 3),
        image_token_index=tokens,
        image_grid_pinpoints=[[height, width], [width, width]],
    )
    theirs = draw(LlavaNextForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path)
    crops = torch.stack([pixels(seed)[0] for seed in range(3)])
    side = IMAGE_SIZE // TOWER["patch_size"]
    count = side * side + side * (2 * side + 1)  # the small copy, then two tiles side by side with row ends
    ids = torch.tensor([[*BEFORE, *[tokens] * count, *AFTER]])
    with torch.inference_mode():
        expected = theirs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=crops[None],
            image_sizes=torch.tensor([[height, width]]),
        ).logits[..., :tokens]

        model = load_pretrained_model(tmp_path, device="cpu")[1]
        assert model.config.image_aspect_ratio == "anyres"
        prompt = torch.tensor([[*BEFORE, -200, *AFTER]])
        found = model(prompt, images=[crops], image_sizes=[(width, height)]).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    # The budget goes through the loader into the config; it is a budget for tiles only.
    options = {"device": "cpu", "reducer": "topk(tokens=9)", "anyres": "shared"}
    shared = load_pretrained_model(tmp_path, **options)[1]
    assert shared.config.mm_anyres_budget == "shared"
    (joined,) = shared.embed_images([crops], [(width, height)])
    kept = sum(int(view.lengths) for view in shared.reduce_images(crops, [3], [shared.reducer])[1])
    assert kept == 9 and kept < len(joined) <= kept + side  # ends of the rows that have a patch
    shared.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").mm_anyres_budget == "shared"
    with pytest.raises(UserError, match="'smaller'"):
        load_pretrained_model(tmp_path, device="cpu", anyres="smaller")


@pytest.mark.parametrize(("text_type", "version"), [("qwen2", "qwen_2"), ("mistral", "mistral_instruct")])
def test_training_from_a_plain_language_model(tmp_path, text_type, version):
    """One step of LoRA on it: the class that belongs to it, its layers adapted; the result loads, and merged
    into transformers' format gives the same ids there."""
    tiny = tiny_training.make(tmp_path)
    for file in tiny.models.base.glob("*"):
        file.unlink()
    tokens = tokenizer_for(text_type)(tiny.models.base)
    # Qwen2's vocabulary is larger than its tokenizer.
    draw(AutoModelForCausalLM.from_config(text_config(text_type, tokens + 5))).save_pretrained(
        tiny.models.base
    )
    run = tmp_path / "llava-lora"
    assert tiny.train(run, f"{tiny_training.STAGES['lora']} --max_steps 1 --version {version}")

    adapter = json.loads((run / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    config = json.loads((run / "config.json").read_text())
    model = load_pretrained_model(run, tiny.models.base, device="cpu")[1]
    assert TEXT_TYPES[config["model_type"]] == text_type
    assert type(model) is LANGUAGE_MODELS[config["model_type"]]
    assert config["vocab_size"] == model.get_input_embeddings().weight.shape[0] == tokens + 5
    assert model.get_model().mm_projector[2].weight.shape == (HIDDEN, HIDDEN)
    # FSDP and device maps keep a decoder layer together.
    assert type(model.get_model().layers[0]).__name__ in model._no_split_modules

    hf, parts = tmp_path / "hf", ["--model-path", str(run), "--model-base", str(tiny.models.base)]
    assert main(["tools", "convert", "--to", "llava-hf", *parts, "--out", str(hf)]) == 0
    theirs = LlavaForConditionalGeneration.from_pretrained(hf)
    assert their_ids(theirs, pixels(0)) == our_ids(run, pixels(0), tiny.models.base)


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        # LLaVA-1.5, its LoRA checkpoints, and LLaVA-1.6's 34B
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llava_llama"),
        ({"model_type": "llava", "architectures": ["LlamaForCausalLM"]}, "llava_llama"),
        ({"model_type": "llava_llama"}, "llava_llama"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "llava_mistral"),
        ({"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, "llava_mistral"),
        ({"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}, "llava_qwen"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "llava_qwen"),
        ({"model_type": "qwen3"}, "llava_qwen3"),
    ],
)
def test_the_class_follows_from_the_config(config, model_type):
    assert language_model_of(config, Path("config.json")) is LANGUAGE_MODELS[model_type]


def test_a_language_model_we_have_no_class_for(tmp_path):
    with pytest.raises(UserError, match=r"config.json.*LlavaMptForCausalLM.*llama.*qwen2"):
        config = {"model_type": "llava", "architectures": ["LlavaMptForCausalLM"]}
        language_model_of(config, Path("config.json"))
    llava_hf(tmp_path / "hf", "gemma")
    with pytest.raises(UserError, match="gemma"):
        load_pretrained_model(tmp_path / "hf", device="cpu")


def test_auto_classes_know_the_language_models(tmp_path):
    for name, our in LANGUAGE_MODELS.items():
        llava_hf(tmp_path / name, TEXT_TYPES[name])
        info = inspect_checkpoint(tmp_path / name)
        config = build_config(llava_config_dict(info), info)
        config.save_pretrained(tmp_path / f"config-{name}")
        again = AutoConfig.from_pretrained(tmp_path / f"config-{name}")
        assert type(again) is our.config_class
        assert AutoModelForCausalLM._model_mapping[type(again)] is our


def test_the_file_that_contributing_shows(root, tmp_path):
    """Put where it says, it passes what the models of the table pass."""
    page = (root / "CONTRIBUTING.md").read_text()
    (name,) = re.findall(r"`llava/model/language_model/`, say `(\w+)\.py`", page)
    (code,) = re.findall(r"^<!-- tests/test_language_models.+\n```python\n(.*?)^```$", page, re.M | re.S)
    for folder in ("llava", "tests"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / f"llava/model/language_model/{name}.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "tests/test_language_models.py", "-k"]
    command += [f"{name} or auto_classes"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " 2 passed" in done.stdout, done.stdout[-3000:]
