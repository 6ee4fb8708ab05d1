"""The vision towers against transformers' full models, and against the reference's features."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import safe_open, save_file
from torch import nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.errors import UserError
from llava.mm_utils import process_images
from llava.model.encoders import ENCODERS
from llava.model.vision_tower import VisionTower, load_vision_tower
from llava.reducers import build_reducer

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 14}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every part of the model matters (LayerScale too)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1")) else 0.0
            parameter.copy_(shift + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip() -> CLIPVisionModel:
    return randomised(CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=64, image_size=56)))


def make_model(kind: str):
    """A small random model of each kind."""
    if kind == "clip":
        return clip()
    if kind == "dinov2":
        config = Dinov2Config(**SMALL, image_size=70, mlp_ratio=2, layerscale_value=0.5)
        return randomised(Dinov2Model(config))
    if kind == "registers":
        config = Dinov2WithRegistersConfig(**SMALL, image_size=70, mlp_ratio=2, num_register_tokens=3)
        return randomised(Dinov2WithRegistersModel(config))
    return randomised(SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=64, image_size=56)))


def random_pixels(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


PREFIX = {"clip": 1, "dinov2": 1, "registers": 4, "siglip": 0}
"""Rows before the patches."""
KINDS = list(PREFIX)
# What the projections are called in the full models, independently of the tower's own lookup.
QUERY_NAMES, KEY_NAMES = ("q_proj", "attention.query"), ("k_proj", "attention.key")


def full_model(model, pixels: torch.Tensor):
    """hidden_states of the whole transformers model and what its last block's q and k projections gave."""
    last = f".{SMALL['num_hidden_layers'] - 1}."
    heard: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        for part, names in (("query", QUERY_NAMES), ("key", KEY_NAMES)):
            if "layer" in name and last in name and name.endswith(names):

                def hear(_module, _inputs, output, part=part):
                    heard[part] = output

                hooks.append(module.register_forward_hook(hear))
    assert len(hooks) == 2
    options = {"output_hidden_states": True}
    if not model.config.model_type.startswith("dinov2"):
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        states = model(pixels, **options).hidden_states
    for hook in hooks:
        hook.remove()
    return states, heard["query"], heard["key"]


@pytest.mark.parametrize("size", [(56, 56), (56, 98)], ids=str)
@pytest.mark.parametrize("select_layer", [-1, -2, 1, 0, -5])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_full_model(kind, select_layer, size):
    model, prefix, pixels = make_model(kind), PREFIX[kind], random_pixels(*size)
    states, query, key = full_model(model, pixels)
    tower = VisionTower(model, select_layer=select_layer)
    features = tower(pixels, reads=["cls", "mean_query"])
    assert len(states) == 5
    torch.testing.assert_close(features.patches, states[select_layer][:, prefix:], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.patch_key, key[:, prefix:], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.mean_query, query[:, prefix:].mean(1), atol=1e-5, rtol=0)
    if kind == "siglip":
        assert features.query is None and features.cls is None and not features.has_cls
    else:
        torch.testing.assert_close(features.query, query[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.key[:, 0], key[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.cls, states[select_layer][:, :1], atol=1e-5, rtol=0)
        whole = VisionTower(model, select_layer=select_layer, select_feature="cls_patch").tokens(pixels)
        torch.testing.assert_close(whole, torch.cat([features.cls, features.patches], 1), atol=0, rtol=0)
    assert features.grid == (size[0] // 14, size[1] // 14)
    assert features.num_heads == 4
    torch.testing.assert_close(tower.tokens(pixels), features.patches, atol=0, rtol=0)


def test_probe_attention_is_that_of_the_pooling_head():
    """What the head itself weighs the patches with, caught as it runs; None without the head."""
    model, pixels = make_model("siglip"), random_pixels(84, 84)
    weights = []
    hook = model.head.attention.register_forward_hook(lambda _m, _i, output: weights.append(output[1]))
    with torch.no_grad():
        model(pixels, interpolate_pos_encoding=True)
    hook.remove()
    probe = VisionTower(model)(pixels, reads=["probe_attention"]).probe_attention
    torch.testing.assert_close(probe, weights[0].squeeze(1), atol=1e-6, rtol=0)
    assert VisionTower(clip())(pixels, reads=["probe_attention"]).probe_attention is None
    headless = SiglipVisionConfig(**SMALL, intermediate_size=64, image_size=56, vision_use_head=False)
    tower = VisionTower(SiglipVisionModel(headless))
    assert tower(pixels, reads=["probe_attention"]).probe_attention is None


@pytest.mark.parametrize(("select_layer", "runs"), [(-2, [0, 1, 2]), (-1, [0, 1, 2, 3]), (-4, [0, 1, 2])])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_no_block_whose_output_nobody_reads(kind, select_layer, runs):
    """A reducer's key comes from the last block's input, so blocks up to there run; `tokens` needs fewer."""
    tower = VisionTower(make_model(kind), select_layer=select_layer)
    ran: list[int] = []
    rows_through_query: list[int] = []
    for index, block in enumerate(tower.encoder.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    query, _ = tower.encoder.query_key(tower.encoder.blocks[-1])
    query.register_forward_hook(
        lambda _m, inputs, _o: rows_through_query.append(inputs[0].shape[:-1].numel())
    )
    pixels = torch.zeros(2, 3, 56, 56)
    tower(pixels)
    assert ran == runs
    if select_layer != -1:  # the last block, if run, projects every row itself
        assert rows_through_query == ([] if kind == "siglip" else [2])
    ran.clear()
    tower.tokens(pixels)
    assert ran == [0, 1, 2, 3][: select_layer % 5]


def test_a_tower_is_frozen_and_builds_no_graph():
    tower = VisionTower(clip())
    model = nn.Sequential(tower).train()
    assert not any(module.training for module in model[0].modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    features = tower(torch.zeros(1, 3, 56, 56, requires_grad=True))
    assert not features.patches.requires_grad and not features.key.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_differentiable_and_leaves_the_model_as_it_is(kind):
    model = make_model(kind).train()
    encoder, pixels = ENCODERS[model.config.model_type](model), random_pixels(56, 56)
    features = encoder.features(pixels, [-2, 1])
    (features.patches.sum() + features.key.sum()).backward()
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    heard = []
    hook = encoder.query_key(encoder.blocks[-1])[1].register_forward_hook(
        lambda _m, _i, output: heard.append(output)
    )
    states = model(pixels, output_hidden_states=True).hidden_states
    hook.remove()
    prefix, (key,) = PREFIX[kind], heard
    if prefix > 1:
        key = torch.cat([key[:, :1], key[:, prefix:]], dim=1)
    (states[-2][:, prefix:].sum() + states[1][:, prefix:].sum() + key.sum()).backward()
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    tower, pixels = VisionTower(make_model(kind)), random_pixels(84, 84, batch=1)
    full = tower(pixels)
    half = tower.to(dtype)(pixels)
    assert half.patches.dtype == half.key.dtype == dtype
    close = 0.02 if dtype == torch.float16 else 0.1
    assert (half.patches.float() - full.patches).abs().max() < close * full.patches.abs().max()


# Directories


def write_processor(directory, size: int = 56) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(directory)


def flat_names(directory, model):
    save_file(dict(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})


def old_pickle(directory, model):
    state = {f"vision_model.{name}": value for name, value in model.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # old versions saved it
    torch.save(state, directory / "pytorch_model.bin")


def sharded(directory, model):
    model.save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1


def whole_clip(directory, model):
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    config = CLIPConfig(text_config=text, vision_config=model.config.to_dict(), projection_dim=8)
    whole = CLIPModel(config)
    whole.vision_model.load_state_dict(model.state_dict())
    whole.save_pretrained(directory)


def inside_llava_hf(directory, model):
    state = {f"vision_tower.vision_model.{name}": value for name, value in model.state_dict().items()}
    state["language_model.model.norm.weight"] = torch.ones(8)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    text = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16).to_dict()
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": model.config.to_dict(),
        "text_config": text,
    }
    (directory / "config.json").write_text(json.dumps(config, default=str))


@pytest.mark.parametrize("write", [flat_names, old_pickle, sharded, whole_clip, inside_llava_hf])
def test_reads_every_spelling_of_clip(tmp_path, write):
    model = clip()
    model.config.save_pretrained(tmp_path)
    write_processor(tmp_path)
    write(tmp_path, model)
    tower = load_vision_tower(tmp_path)
    pixels = random_pixels(56, 56)
    expected = VisionTower(model)(pixels)
    found = tower(pixels)
    torch.testing.assert_close(found.patches, expected.patches, atol=0, rtol=0)
    torch.testing.assert_close(found.query, expected.query, atol=0, rtol=0)
    torch.testing.assert_close(found.key, expected.key, atol=0, rtol=0)
    assert tower.backbone.config._attn_implementation == "sdpa"  # no attention map in memory
    assert next(iter(tower.state_dict())).startswith("vision_tower.vision_model.")  # LLaVA's names


def test_reads_dinov2_with_its_processor(tmp_path):
    """A position table larger than the images, as in the small model we ship."""
    config = Dinov2Config(**SMALL, image_size=98, mlp_ratio=2)
    model = randomised(Dinov2Model(config))
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_mean=[0.5] * 3
    ).save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path, dtype=torch.float32)
    assert isinstance(tower.image_processor, BitImageProcessorPil)
    assert tower.grid == (4, 4) and tower.num_patches == 16 and tower.hidden_size == 32
    pixels = tower.image_processor.preprocess(Image.new("RGB", (80, 60), (200, 10, 30)), return_tensors="pt")
    features = tower(pixels["pixel_values"])
    with torch.no_grad():
        states = model(pixels["pixel_values"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(features.patches, states[-2][:, 1:], atol=1e-5, rtol=0)


# Bad input


def test_a_directory_that_is_no_tower(tmp_path):
    with pytest.raises(UserError, match=r"--vision-tower"):
        load_vision_tower(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json"):
        load_vision_tower(tmp_path)
    LlamaConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"llama.*clip_vision_model"):
        load_vision_tower(tmp_path)
    for broken in (b"\xff\xfe{", b'{"model_type": "clip_vision_model", "hidden_size": "wide"}', b"[]"):
        (tmp_path / "config.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"config\.json"):
            load_vision_tower(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    model = clip()
    model.config.save_pretrained(tmp_path)
    write_processor(tmp_path)
    (old_pickle if suffix == "bin" else flat_names)(tmp_path, model)
    (file,) = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=file.name):
        load_vision_tower(tmp_path)


def test_missing_weights_and_processor(tmp_path):
    model = clip()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load_vision_tower(tmp_path)
    write_processor(tmp_path)
    with pytest.raises(UserError, match=r"safetensors"):
        load_vision_tower(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if "layers.3" not in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors.*16"):
        load_vision_tower(tmp_path)


def test_impossible_selections():
    with pytest.raises(UserError, match=r"select_layer 5 .*-5 to 4"):
        VisionTower(clip(), select_layer=5)
    with pytest.raises(UserError, match="select_feature"):
        VisionTower(clip(), select_feature="cls")
    with pytest.raises(UserError, match="siglip_vision_model"):
        VisionTower(make_model("siglip"), select_feature="cls_patch")


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 4, 56, 56), (1, 3, 56, 13)])
def test_pixels_of_another_shape(shape):
    with pytest.raises(UserError, match=re.escape(str(list(shape)))):
        VisionTower(clip())(torch.zeros(shape))


# The reference


def test_reference_features(golden):
    """hidden_states[-2] of the reference's tower on real pictures, LLaVA's preprocessing included."""
    tower = load_vision_tower(golden / "llava/ckpt/clip-tiny-336")
    numbers = np.load(golden / "llava/model/head.npz")
    cases = json.loads((golden / "llava/model/head.json").read_text())

    class Config:
        image_aspect_ratio = "pad"

    for index, case in enumerate(cases["full"]):
        if not case["images"]:
            continue
        images = [Image.open(golden / "llava/images" / name) for name in case["images"]]
        tokens = tower.tokens(process_images(images, tower.image_processor, Config))
        rows = tokens[0, [0, 1, 288, 574, 575]]
        reference = torch.from_numpy(numbers[f"full__{index}__tower_rows"])
        torch.testing.assert_close(rows, reference, atol=1e-4, rtol=0)
        reference = torch.from_numpy(numbers[f"full__{index}__tower_sum"])
        torch.testing.assert_close(tokens.sum(1)[: len(reference)], reference, atol=5e-3, rtol=0)


def test_reference_from_pixels_to_pruned_tokens(golden):
    """Tower and reducer together; runs of one image (the reference pools larger batches)."""
    path = golden / "reducers/e2e.safetensors"
    tower = load_vision_tower(golden / "reducers/tiny_clip")
    names = {"prumerge": "prumerge", "prumerge_plus": "prumerge+"}
    seen = 0
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["case"])
        for run in meta["runs"]:
            if "error" in run or (len(run["images"]) > 1 and run["adaptive"]):
                continue
            if run["variant"] == "prumerge_plus" and not run["adaptive"]:
                continue  # keeps patches twice, which ours never does
            if run["images"] == [meta["png"]["file"]]:
                picture = Image.open(golden / "reducers" / meta["png"]["file"])

                class Config:
                    image_aspect_ratio = "pad"

                pixels = process_images([picture], tower.image_processor, Config)
                torch.testing.assert_close(
                    pixels[:, :, ::12, ::12], file.get_tensor("png.pixel_probe"), atol=1e-6, rtol=0
                )
            else:
                small = torch.stack([file.get_tensor(f"image.{name}") for name in run["images"]])
                pixels = small.repeat_interleave(7, 2).repeat_interleave(7, 3)
            ratio = "" if run["adaptive"] else f"(ratio={run['reduction_ratio_arg']})"
            reduced = build_reducer(names[run["variant"]] + ratio)(tower(pixels))
            indices = file.get_tensor(f"{run['id']}.idx")
            assert torch.equal(reduced.kept[:, : indices.shape[1]].int(), indices), run["id"]
            tokens = torch.stack(reduced.unbind())
            torch.testing.assert_close(tokens, file.get_tensor(f"{run['id']}.tokens"), atol=2e-5, rtol=0)
            seen += 1
    assert seen > 0


@pytest.mark.parametrize("kind", ["clip", "dinov2", "registers"])
def test_attention_fields_are_those_of_the_whole_model(kind):
    """transformers' own attention maps and hidden states, of the block whose output the patches are."""
    model, pixels = make_model(kind), random_pixels(70, 56)
    prefix = VisionTower(model).encoder.num_prefix_tokens
    reads = ["cls", "cls_attn", "block_key", "attn_mid", "attn_deep"]
    features = VisionTower(model)(pixels, reads)
    model.set_attn_implementation("eager")
    options = {"interpolate_pos_encoding": True} if kind == "clip" else {}
    with torch.no_grad():
        output = model(pixels, output_attentions=True, output_hidden_states=True, **options)
    mid, deep = (output.attentions[block] for block in (1, 2))  # of 4 blocks; -2: the output of block 2
    close = {"atol": 1e-6, "rtol": 1e-4}
    torch.testing.assert_close(features.cls, output.hidden_states[-2][:, :1], **close)
    torch.testing.assert_close(features.cls_attn, deep[:, :, 0, prefix:], **close)
    for field, attention in ((features.attn_mid, mid), (features.attn_deep, deep)):
        received = attention.mean((1, 2))
        rows = torch.cat([received[:, :1], received[:, prefix:]], dim=1)
        torch.testing.assert_close(field, rows, **close)
    assert features.block_key.shape == features.key.shape


@pytest.mark.parametrize("spec", ["visionzip", "scope", "vispruner", "hiprune", "holov", "tome", "evit"])
def test_rivals_reduce_what_the_tower_gives(spec):
    reducer = build_reducer(f"{spec}(tokens=12)")
    tower, pixels = VisionTower(clip()), random_pixels(84, 84)
    both = reducer(tower(pixels, reducer.reads))
    one = reducer(tower(pixels[1:], reducer.reads))
    torch.testing.assert_close(both.unbind()[1], one.unbind()[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(both.source[1:], one.source)


@pytest.mark.parametrize("spec", ["prumerge(tokens=5)", "prumerge+(tokens=8)", "topk(tokens=5)", "prumerge"])
def test_siglip_is_reduced_by_its_probe(spec):
    """Kept are the patches its pooling head attends to most; a picture alone gets what it gets in a batch."""
    reducer, tower, pixels = build_reducer(spec), VisionTower(make_model("siglip")), random_pixels(84, 84)
    features = tower(pixels, reducer.asks)
    both, one = reducer(features), reducer(tower(pixels[1:], reducer.asks))
    torch.testing.assert_close(both.unbind()[1], one.unbind()[0], atol=1e-5, rtol=1e-4)
    if spec == "topk(tokens=5)":
        best = features.probe_attention.topk(5, dim=1).indices.sort(dim=1).values
        assert both.kept.tolist() == best.tolist()
    mean = build_reducer("topk(tokens=5, score=mean)")
    assert mean(tower(pixels, mean.asks)).kept.shape == (len(pixels), 5)
