"""load_pretrained_model: every kind of checkpoint gives the reference's answers, and bad ones a sentence."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import (
    HIDDEN,
    IMAGE_SIZE,
    RANK,
    TOWER_HIDDEN,
    VISUAL_TOKENS,
    Family,
    edit_json,
    single_safetensors,
    write_json,
    write_tokenizer,
)
from transformers import LlamaForCausalLM

from llava import hardware
from llava.errors import UserError
from llava.mm_utils import process_images
from llava.model import builder
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints import (
    inspect_checkpoint,
    read_model_weights,
    save_full,
    save_lora,
    save_projector,
)

PROMPT = torch.tensor([[1, 270, 280, -200, 290, 300]])


def load(path: Path, base: Path | None = None, **options):
    return load_pretrained_model(path, base, "any-name", device="cpu", **options)


@torch.inference_mode()
def logits(model, prompt: torch.Tensor = PROMPT, images: bool = True) -> torch.Tensor:
    """Of a fixed prompt with a fixed image (where the model can see)."""
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))
    return model(prompt, images=pixels).logits if images else model(prompt[prompt >= 0][None]).logits


# The reference


@pytest.mark.parametrize("key", ["full", "lora", "projector", "withtower", "llava_hf"])
def test_golden(golden, key):
    root = golden / "llava"
    reference = json.loads((root / "model/head.json").read_text())
    arrays = np.load(root / "model/head.npz")
    cases = "full" if key == "llava_hf" else key  # the same weights in another format
    meta = reference[f"{cases}__meta"]
    path = root / ("ckpt/llava-tiny-1.5-7b-hf" if key == "llava_hf" else meta["path"])
    base = root / meta["base"] if meta["base"] else None
    tokenizer, model, processor, context = load(path, base, dtype="float32")
    assert (context, model.config.vocab_size, len(tokenizer)) == (
        meta["context_len"],
        meta["vocab"],
        meta["vocab"],
    )
    assert model.config.image_aspect_ratio == meta["image_aspect_ratio"]
    assert tokenizer.pad_token == (meta["pad"] or "<unk>")

    few = 2 if key in ("withtower", "llava_hf") else None
    for index, case in enumerate(reference[cases][:few]):
        ids = torch.tensor([case["input_ids"]])
        pictures = [Image.open(root / "images" / name).convert("RGB") for name in case["images"]]
        pixels = process_images(pictures, processor, model.config) if pictures else None
        with torch.inference_mode():
            rows = model(ids, images=pixels).logits[0, case["logit_rows"]]
            answer = model.generate(ids, images=pixels, max_new_tokens=16, do_sample=False)
        np.testing.assert_allclose(rows.numpy(), arrays[f"{cases}__{index}__rows"], atol=1e-4, rtol=0)
        assert answer[0].tolist() == case["greedy16"]


# Kinds against each other


def test_full_is_frozen_and_quiet(tiny, capfd):
    tokenizer, model, processor, context = load(tiny.full)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32  # what a CPU wants; the files may say otherwise
    assert (len(tokenizer), context) == (tiny.vocab_size, 2048)
    assert processor.crop_size["height"] == IMAGE_SIZE
    assert capfd.readouterr().err == ""


def test_projector_on_its_base_is_the_full_model(tiny):
    expected = logits(load(tiny.full)[1])
    assert torch.equal(logits(load(tiny.projector, tiny.base)[1]), expected)


def lora_by_hand(tiny: Family) -> dict[str, torch.Tensor]:
    """The merged weights by the formula, W + (alpha / r) B A."""
    adapter = torch.load(tiny.lora / "adapter_model.bin")
    merged = {**tiny.language_model, **tiny.projector_weights}
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            up = adapter[name.replace("lora_A", "lora_B")]
            merged[target] = merged[target] + 8 / RANK * up @ down
    return merged


def test_lora_merged_and_kept(tiny):
    from peft import PeftModel

    merged = load(tiny.lora, tiny.base)[1]
    kept = load(tiny.lora, tiny.base, merge_lora=False)[1]
    assert isinstance(kept, PeftModel)
    assert not isinstance(merged, PeftModel)
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    single_safetensors(tiny.full, lora_by_hand(tiny))
    expected = load(tiny.full)[1]
    torch.testing.assert_close(logits(merged), logits(expected), atol=1e-5, rtol=0)
    # Another order of sums: on a CPU without AVX-512 a logit of 2.4 was seen to differ by 1.1e-5.
    torch.testing.assert_close(logits(kept), logits(merged), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(merged), logits(load(tiny.projector, tiny.base)[1]), atol=1e-2)
    new = [
        model.generate(PROMPT, visual_tokens=[torch.ones(3, TOWER_HIDDEN)], max_new_tokens=4)
        for model in (merged, kept)
    ]
    assert torch.equal(*new)


def test_lora_trained_on_a_llava(tiny):
    """Task LoRA: the base brings a projector, the checkpoint's own lies over it."""
    expected = logits(load(tiny.lora, tiny.base)[1])
    index = json.loads((tiny.full / "pytorch_model.bin.index.json").read_text())["weight_map"]
    shard = tiny.full / index["model.mm_projector.0.bias"]
    torch.save({n: t * 0 if "mm_projector" in n else t for n, t in torch.load(shard).items()}, shard)
    assert torch.equal(logits(load(tiny.lora, tiny.full)[1]), expected)


def test_adapter_alone_takes_the_base_s_config(tiny):
    """PEFT's own checkpoint of a LLaVA: no config, no projector; both are the base's."""
    expected = logits(load(tiny.lora, tiny.full)[1])
    (tiny.lora / "config.json").unlink()
    (tiny.lora / "non_lora_trainables.bin").unlink()
    assert torch.equal(logits(load(tiny.lora, tiny.full)[1]), expected)


def test_trained_embeddings_with_added_tokens(tiny):
    """im_start and im_end: the checkpoint has two rows more than its base, and a tokenizer without them."""
    rows = tiny.vocab_size + 2
    table = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3))
    head = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(4))
    extra = {"base_model.model.model.embed_tokens.weight": table, "base_model.model.lm_head.weight": head}
    file = tiny.lora / "non_lora_trainables.bin"
    torch.save({**torch.load(file), **extra}, file)
    edit_json(tiny.lora / "config.json", vocab_size=rows, mm_use_im_start_end=True)
    tokenizer, model, *_ = load(tiny.lora, tiny.base)
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [rows - 2, rows - 1]
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.equal(model.lm_head.weight, head)


def test_added_token_that_was_not_trained(tiny):
    """LoRA with a [PAD] added: config.json counts a row that no file has."""
    edit_json(tiny.lora / "config.json", vocab_size=tiny.vocab_size + 1)
    model = load(tiny.lora, tiny.base)[1]
    expected = tiny.language_model["lm_head.weight"].mean(0)
    torch.testing.assert_close(model.lm_head.weight[-1], expected)


def test_patch_token_is_added_where_the_config_is_silent(tiny):
    edit_json(tiny.full / "config.json", mm_use_im_patch_token=None)
    tokenizer, model, *_ = load(tiny.full)
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == tiny.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == tiny.vocab_size + 1


def test_tied_embeddings(tiny):
    """SmolLM2 and its like have no lm_head on disk."""
    weights = {name: tensor for name, tensor in tiny.language_model.items() if name != "lm_head.weight"}
    single_safetensors(tiny.base, weights)
    for directory in (tiny.base, tiny.projector):
        edit_json(directory / "config.json", tie_word_embeddings=True)
    model = load(tiny.projector, tiny.base)[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, tiny.language_model["model.embed_tokens.weight"])


# Towers


def with_tower_keys(tiny: Family) -> None:
    clip = torch.load(tiny.tower / "pytorch_model.bin")
    own = {
        f"model.vision_tower.vision_tower.{name}": tensor * 0.5
        for name, tensor in clip.items()
        if name.startswith("vision_model.")
    }
    single_safetensors(tiny.full, {**tiny.language_model, **tiny.projector_weights, **own})


def test_tower_keys_are_ignored(tiny):
    expected = logits(load(tiny.full)[1])
    with_tower_keys(tiny)
    assert torch.equal(logits(load(tiny.full)[1]), expected)


def test_an_unfrozen_tower_comes_from_the_checkpoint(tiny):
    with_tower_keys(tiny)
    edit_json(tiny.full / "config.json", unfreeze_mm_vision_tower=True)
    weight = load(tiny.full)[1].get_vision_tower().backbone.embeddings.patch_embedding.weight
    clip = torch.load(tiny.tower / "pytorch_model.bin")
    assert torch.equal(weight, clip["vision_model.embeddings.patch_embedding.weight"] * 0.5)


def test_tower_is_found_beside_the_checkpoint(tiny, monkeypatch):
    expected = logits(load(tiny.full)[1])
    shutil.move(tiny.root / "towers", tiny.full / "towers")
    monkeypatch.chdir("/")
    assert torch.equal(logits(load(tiny.full)[1]), expected)


def test_tower_override(tiny):
    edit_json(tiny.full / "config.json", mm_vision_tower="openai/nowhere")
    with pytest.raises(UserError, match=r"openai/nowhere .*--vision-tower PATH"):
        load(tiny.full)
    load(tiny.full, vision_tower=tiny.tower)


# Reducers


def test_reducer_is_obeyed_overridden_and_missed(tiny, caplog):
    _, model, *_ = load(tiny.full)
    assert model.config.mm_token_reducer == "none"
    assert f"all {VISUAL_TOKENS} visual tokens" in caplog.text
    assert "--reducer" in caplog.text
    caplog.clear()
    edit_json(tiny.full / "config.json", mm_token_reducer="topk(tokens=5)")
    assert load(tiny.full)[1].reducer.spec == "topk(tokens=5)"
    model = load(tiny.full, reducer="grid(tokens=4)")[1]
    assert model.reducer.spec == model.config.mm_token_reducer == "grid(tokens=4)"
    assert len(model.encode_images(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))[0]) == 4
    assert "visual tokens" not in caplog.text


def test_unknown_reducer_in_a_config(tiny):
    edit_json(tiny.full / "config.json", mm_token_reducer="tomorrow(tokens=3)")
    with pytest.raises(UserError, match=r"llava-tiny/config.json, mm_token_reducer: .*tomorrow"):
        load(tiny.full)


# Flags


def test_what_harnesses_pass(tiny):
    load_pretrained_model(str(tiny.full), None, "llava", False, False, "auto", "cpu", False)
    load_pretrained_model(
        str(tiny.full),
        None,
        "llava",
        device_map="",
        multimodal=True,
        use_flash_attention_2=False,
        device="cpu",
    )
    load_pretrained_model(
        model_path=str(tiny.full), model_base=None, model_name="x", device="cpu", device_map="cpu"
    )
    with pytest.raises(TypeError, match="no_such_keyword"):
        load(tiny.full, no_such_keyword=1)


def test_dtype_and_attention(tiny):
    model = load(tiny.full, torch_dtype=torch.bfloat16, attn_implementation="eager")[1]
    assert model.dtype == model.get_vision_tower().dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load(tiny.full, dtype="float16")[1].dtype == torch.float16
    for wrong in ({"dtype": "int8"}, {"attn_implementation": "fastest"}, {"use_flash_attn": True}):
        with pytest.raises(UserError):
            load(tiny.full, **wrong)


def test_customized_config(tiny):
    content = {**json.loads((tiny.full / "config.json").read_text()), "image_aspect_ratio": "square"}
    file = tiny.root / "other.json"
    write_json(file, content)
    for given in (file, content):
        assert load(tiny.full, customized_config=given)[1].config.image_aspect_ratio == "square"


def test_context_length(tiny):
    edit_json(tiny.full / "config.json", max_sequence_length=333)
    assert load(tiny.full)[3] == 333


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    "device_map", ["auto", "cuda:0", "", None, 0, {"": "cuda:0"}, {"model": 0, "lm_head": 1}]
)
def test_without_cuda_it_runs_on_what_there_is(tiny, device_map, caplog):
    model = load_pretrained_model(tiny.full, None, "llava", device_map=device_map)[1]
    assert model.device.type == hardware.plan().device.type
    assert "no CUDA device" in caplog.text


def test_unknown_device(tiny):
    with pytest.raises(UserError, match="'gpu'"):
        load_pretrained_model(tiny.full, device_map="gpu")


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, as far as decisions go."""
    if importlib.util.find_spec("bitsandbytes"):
        importlib.import_module("bitsandbytes")  # asks CUDA what it can when it is first imported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70"])
    for name in ("LLAVA_DEVICE", "LLAVA_DTYPE", "LLAVA_ATTENTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("v100")
@pytest.mark.parametrize(
    ("device", "device_map", "dtype", "expected"),
    [
        ("cuda", "auto", torch.float16, "auto"),
        ("cuda", "balanced", torch.float16, "balanced"),
        ("cuda", "", torch.float16, {"": torch.device("cuda")}),
        ("cuda", None, torch.float16, {"": torch.device("cuda")}),
        ("cuda", "cuda:1", torch.float16, {"": torch.device("cuda:1")}),
        ("cuda", 1, torch.float16, {"": torch.device("cuda:1")}),
        ("cuda:1", "auto", torch.float16, {"": torch.device("cuda:1")}),
        ("cuda", {"model": 0, "lm_head": 1}, torch.float16, {"model": 0, "lm_head": 1}),
        ("cpu", "auto", torch.float32, {"": torch.device("cpu")}),
        # VLMEvalKit loads so and then calls .cuda()
        ("cpu", "cpu", torch.float16, {"": torch.device("cpu")}),
    ],
)
def test_placement(device, device_map, dtype, expected):
    plan, placed = builder._place(device, device_map, None, None)
    assert (plan.dtype, placed) == (dtype, expected)


@pytest.mark.usefixtures("v100")
def test_no_8bit_on_a_v100(tiny):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="load_4bit"):
        load_pretrained_model(tiny.full, load_8bit=True)


@pytest.mark.parametrize("flag", ["load_4bit", "load_8bit"])
def test_quantised(tiny, flag):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    exact = logits(load(tiny.full)[1])
    model = load(tiny.full, **{flag: True})[1]
    layer = {"load_4bit": bitsandbytes.nn.Linear4bit, "load_8bit": bitsandbytes.nn.Linear8bitLt}[flag]
    quantised = {name for name, module in model.named_modules() if isinstance(module, layer)}
    assert len(quantised) == 2 * 7  # the linears of the layers; not the head, the projector or the tower
    assert all(name.startswith("model.layers.") for name in quantised)
    if flag == "load_4bit":
        assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested
    error = (logits(model) - exact).norm() / exact.norm()
    assert 0 < error < {"load_4bit": 0.5, "load_8bit": 0.1}[flag]


def test_quantised_lora(tiny):
    pytest.importorskip("bitsandbytes")
    # Rounded once: merging gives the very weights that quantising the merged model does.
    merged = load(tiny.lora, tiny.base, load_4bit=True)[1]
    single_safetensors(tiny.full, lora_by_hand(tiny))
    expected = load(tiny.full, load_4bit=True)[1]
    torch.testing.assert_close(logits(merged), logits(expected), atol=1e-4, rtol=0)

    kept = load(tiny.lora, tiny.base, load_4bit=True, merge_lora=False)[1]
    adapter = torch.load(tiny.lora / "adapter_model.bin")
    down = kept.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(down, adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    assert not torch.allclose(logits(kept), logits(load(tiny.projector, tiny.base, load_4bit=True)[1]))


def test_both_quantisations(tiny):
    with pytest.raises(UserError, match="load_8bit"):
        load(tiny.full, load_4bit=True, load_8bit=True)


# Language models without vision


def test_plain_language_model(tiny):
    tokenizer, model, processor, context = load(tiny.base)
    assert (type(model), processor, context) == (LlamaForCausalLM, None, 2048)
    assert tokenizer.decode(tokenizer("kite").input_ids, skip_special_tokens=True) == "kite"
    expected = logits(load(tiny.full)[1], PROMPT[:, :3], images=False)
    assert torch.equal(logits(model, PROMPT[:, :3], images=False), expected)


def test_plain_language_model_with_adapter(tiny):
    expected = logits(load(tiny.lora, tiny.base)[1], PROMPT[:, :3], images=False)
    for name in ("config.json", "non_lora_trainables.bin"):
        (tiny.lora / name).unlink()
    _, model, processor, _ = load(tiny.lora, tiny.base)
    assert processor is None
    torch.testing.assert_close(logits(model, PROMPT[:, :3], images=False), expected, atol=1e-6, rtol=0)


# Generation settings


def test_generation_config_of_vicuna(tiny, caplog):
    settings = load(tiny.projector, tiny.base)[1].generation_config
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (None, None, 512)
    assert settings.eos_token_id == 2


def test_generation_config_that_samples_is_kept(tiny):
    write_json(tiny.full / "generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    settings = load(tiny.full)[1].generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.6, 0.9)


# Bad input


def test_wrong_base(tiny):
    """A base with wider layers: named with both shapes and what it was trained on."""
    weights = dict(tiny.language_model)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(256, HIDDEN)
    single_safetensors(tiny.base, weights)
    with pytest.raises(UserError, match=r"up_proj.weight.*\[256, 64\].*\[128, 64\].*someone/base-tiny"):
        load(tiny.lora, tiny.base)


def test_base_with_another_vocabulary(tiny):
    weights = {**tiny.language_model, "lm_head.weight": torch.zeros(100, HIDDEN)}
    single_safetensors(tiny.base, weights)
    with pytest.raises(UserError, match=r"lm_head.weight has shape \[100, 64\].*wrong base"):
        load(tiny.projector, tiny.base)


def test_adapter_of_another_model(tiny):
    file = tiny.lora / "adapter_model.bin"
    adapter = torch.load(file)
    first = next(iter(adapter))
    more = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    for name, broken in (
        (first, {**adapter, first: torch.zeros(RANK, 100)}),
        (first, {name: tensor for name, tensor in adapter.items() if name != first}),
        (more, {**adapter, more: adapter[first]}),
    ):
        torch.save(broken, file)
        with pytest.raises(UserError, match=f"{file}: {name}"):
            load(tiny.lora, tiny.base)


def test_adapter_targets_that_do_not_exist(tiny):
    edit_json(tiny.lora / "adapter_config.json", target_modules=["query_key_value"])
    with pytest.raises(UserError, match=r"adapter_config.json"):
        load(tiny.lora, tiny.base)


def test_no_tokenizer(tiny):
    for directory in (tiny.lora, tiny.base):
        for file in directory.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load(tiny.lora, tiny.base)


def test_tokenizer_of_another_model(tiny):
    tokenizer = json.loads((tiny.full / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": tiny.vocab_size + i for i in range(100)}
    write_json(tiny.full / "tokenizer.json", tokenizer)
    with pytest.raises(UserError, match=f"{tiny.vocab_size + 100}.*{tiny.vocab_size}"):
        load(tiny.full)


def test_config_that_makes_no_sense(tiny):
    edit_json(tiny.full / "config.json", num_attention_heads="four")
    with pytest.raises(UserError, match=r"config.json"):
        load(tiny.full)


def test_what_is_no_model_is_refused_before_anything_is_read(tiny):
    (tiny.lora / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="--model-base someone/base-tiny"):
        load(tiny.lora)
    with pytest.raises(UserError, match=str(tiny.tower)):
        load(tiny.tower)
    with pytest.raises(UserError, match="prumerg"):
        load(tiny.root / "nowhere", reducer="prumerg")


# Written and read again


def test_full_round_trip(tiny):
    tokenizer, model, *_ = load(tiny.full, reducer="topk(tokens=6)")
    out = tiny.root / "again"
    save_full(model, tokenizer, out)
    names = read_model_weights(inspect_checkpoint(out)).tensors
    assert any(name.startswith("model.vision_tower.") for name in names)
    config = json.loads((out / "config.json").read_text())
    assert config["mm_token_reducer"] == "topk(tokens=6)"
    assert config["model_type"] == "llava_llama"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    edit_json(tiny.full / "config.json", mm_token_reducer="topk(tokens=6)")
    assert torch.equal(logits(load(out)[1]), logits(load(tiny.full)[1]))
    assert len(load(out)[0]) == tiny.vocab_size


def test_names_on_disk_are_llava_s(tiny, golden):
    """The weights of a run of the reference, and ours: same files, same names."""
    artefacts = json.loads((golden / "llava/train/artefacts.json").read_text())
    tokenizer, model, *_ = load(golden / "llava/ckpt/llava-tiny-v1.5-7b")
    out = tiny.root / "again"
    save_full(model, tokenizer, out)
    expected = artefacts["finetune"]["files"]["model.safetensors"]
    found = {name: list(tensor.shape) for name, tensor in safetensors_of(out).items()}
    assert expected.items() <= found.items()  # the reference's run lists a part of the tower
    assert {name for name in found if "vision_tower" not in name} == {
        n for n in expected if "vision_tower" not in n
    }

    save_projector(model, out)
    expected = artefacts["pretrain"]["files"]["mm_projector.bin"]
    assert {n: list(t.shape) for n, t in torch.load(out / "mm_projector.bin").items()} == expected

    model = load(
        golden / "llava/ckpt/llava-tiny-v1.5-7b-lora",
        golden / "llava/ckpt/vicuna-tiny-7b-v1.5",
        merge_lora=False,
    )[1]
    out = tiny.root / "lora-again"
    save_lora(model, out)
    files = artefacts["lora"]["files"]
    assert {file.name for file in out.iterdir()} == {name for name in files if "/" not in name} - {
        "trainer_state.json"
    }
    found = {
        name: list(tensor.shape) for name, tensor in safetensors_of(out, "adapter_model.safetensors").items()
    }
    assert found == files["adapter_model.safetensors"]
    found = {n: list(t.shape) for n, t in torch.load(out / "non_lora_trainables.bin").items()}
    assert found == files["non_lora_trainables.bin"]


def safetensors_of(directory: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / name)


def test_lora_round_trip(tiny):
    kept = load(tiny.lora, tiny.base, merge_lora=False)[1]
    out = tiny.root / "again"
    save_lora(kept, out)
    assert torch.equal(logits(load(out, tiny.base, merge_lora=False)[1]), logits(kept))
    # It names its base, which lies here.
    assert torch.equal(logits(load(out, merge_lora=False)[1]), logits(kept))


def test_projector_round_trip(tiny):
    model = load(tiny.full)[1]
    save_projector(model, tiny.root / "again")
    assert {file.name for file in (tiny.root / "again").iterdir()} == {"config.json", "mm_projector.bin"}
    assert torch.equal(logits(load(tiny.root / "again", tiny.base)[1]), logits(model))


def test_projector_with_trained_embeddings(tiny):
    write_tokenizer(tiny.projector)
    edit_json(tiny.projector / "config.json", mm_use_im_start_end=True)
    model = load(tiny.projector, tiny.base)[1]
    model.get_input_embeddings().weight.data[-2:] = 7
    out = tiny.root / "again"
    save_projector(model, out)
    again = load(out, tiny.base)[1]
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
