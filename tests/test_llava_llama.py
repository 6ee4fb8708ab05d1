"""The model against the reference, against transformers' own LLaVA, and against itself one by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    TextStreamer,
)

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.mm_utils import process_images
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.vision_tower import VisionTower, load_vision_tower

IMAGE = IMAGE_TOKEN_INDEX
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 84,
    "patch_size": 14,
}
VISUAL_TOKENS = 36


def randomise(module: torch.nn.Module, seed: int, scale: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def make_tower(**options) -> VisionTower:
    return VisionTower(randomise(CLIPVisionModel(CLIPVisionConfig(**VISION)), seed=1, scale=0.3), **options)


def make_model(reducer: str = "none", **config) -> LlavaLlamaForCausalLM:
    """A small random LLaVA whose answers depend on every part of it."""
    config = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32} | config
    model = LlavaLlamaForCausalLM(LlavaConfig(**TEXT, mm_token_reducer=reducer, **config))
    randomise(model, seed=2, scale=0.1)
    model.set_vision_tower(make_tower())
    return model


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Half of them strongly uneven, so that adaptive reducers keep different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 84, 84, generator=generator)
    pixels[::2, :, :42] *= 0.05
    return pixels


def prompts(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


MIXED = prompts([1, 5, IMAGE, 7, 8], [1, 9, 10], [1, IMAGE, 4, IMAGE, 3, 2, 11], [1, IMAGE])
"""One image, none, two, one; of different lengths."""


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(row)).long(), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows])
    return ids, mask.long()


# The reference (see ../shared/golden/llava/README.md)


@pytest.fixture(scope="module")
def reference(golden) -> Path:
    return golden / "llava"


@pytest.fixture(scope="module")
def load(reference):
    """Golden checkpoints by name, in float32, each loaded once."""
    loaded = {}

    def get(meta: dict) -> LlavaLlamaForCausalLM:
        if meta["path"] not in loaded:
            base = meta["base"] and reference / meta["base"]
            _, model, _, _ = load_pretrained_model(
                reference / meta["path"], base, device="cpu", dtype="float32", device_map="cpu"
            )
            loaded[meta["path"]] = model
        loaded[meta["path"]].set_reducer("none")
        return loaded[meta["path"]]

    return get


def pixels_of(model, reference: Path, names: list[str]):
    images = [Image.open(reference / "images" / name) for name in names]
    return process_images(images, model.get_vision_tower().image_processor, model.config)


def agrees(model, case: dict, rows: np.ndarray, images) -> None:
    ids = torch.tensor([case["input_ids"]])
    with torch.no_grad():
        logits = model(ids, images=images).logits[0]
    assert len(logits) == case["n_positions"]
    torch.testing.assert_close(logits[case["logit_rows"]], torch.from_numpy(rows), atol=1e-4, rtol=0)
    new = model.generate(ids, images=images, max_new_tokens=16, do_sample=False)
    assert new[0].tolist() == case["greedy16"]


@pytest.mark.parametrize("key", ["full", "lora"])
@pytest.mark.parametrize(
    ("variant", "reducer"),
    [
        ("prumerge", "prumerge"),
        ("prumerge_plus", "prumerge+"),
        ("prumerge_fixed8", "prumerge(ratio=0.125)"),
        ("prumerge_plus_fixed8", "prumerge+(ratio=0.125)"),
    ],
)
def test_reference_with_pruned_tokens(reference, load, key, variant, reducer):
    cases = json.loads((reference / "model/fork.json").read_text())
    numbers = np.load(reference / "model/fork.npz")
    model = load(json.loads((reference / "model/head.json").read_text())[f"{key}__meta"])
    model.set_reducer(reducer)
    for index, case in enumerate(cases[f"{key}__{variant}"]):
        images = pixels_of(model, reference, case["images"])
        if len(images) and reducer == "prumerge+(ratio=0.125)":
            # The reference keeps a patch twice if both rules choose it; ours keeps it once, so has fewer.
            (tokens,) = model.encode_images(images)
            assert 73 < len(tokens) <= case["n_visual_tokens"]
            if len(tokens) < case["n_visual_tokens"]:
                continue
        agrees(model, case, numbers[f"{key}__{variant}__{index}__rows"], images)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bound", [None, 620])
def test_reference_training_batches(reference, load, side, bound):
    """Padding, truncation, labels and loss of three samples, one of them without image."""
    batch = json.loads((reference / "model/batch.json").read_text())
    numbers = np.load(reference / "model/head.npz")
    variant = next(v for v in batch["variants"] if v["name"] == f"batch_{side}_{bound}")
    model = load(json.loads((reference / "model/head.json").read_text())["full__meta"])
    data = json.loads((reference / "model/batch_data.json").read_text())
    images = pixels_of(model, reference, [sample["image"] for sample in data if "image" in sample])
    ids = torch.tensor(batch["input_ids"])
    mask = torch.tensor(batch["attention_mask"]).bool()
    labels = torch.tensor(batch["labels"])
    old = model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length
    model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length = side, bound
    try:
        with torch.no_grad():
            output = model(ids, attention_mask=mask, labels=labels, images=images)
            embeds, layout = model._prepare(ids, mask, labels, images, None, None, side)
    finally:
        model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length = old
    assert abs(output.loss.item() - variant["loss"]) < 1e-4
    assert list(embeds.shape) == variant["shape"]
    assert layout.labels.tolist() == variant["labels"]
    assert layout.attention_mask.sum(1).tolist() == variant["attention_mask_sum"]
    assert layout.attention_mask.int().argmax(1).tolist() == variant["first_true"]
    embeds_sum = torch.from_numpy(numbers[f"{variant['name']}__embeds_sum"])
    torch.testing.assert_close(embeds.sum(-1), embeds_sum, atol=1e-4, rtol=0)
    last = output.logits[torch.arange(3), torch.tensor(variant["last_true"])]
    reference_last = torch.from_numpy(numbers[f"{variant['name']}__last_logits"])
    torch.testing.assert_close(last, reference_last, atol=1e-4, rtol=0)


def test_reference_anyres(reference):
    """LLaVA-1.6's crops under all three ways of joining them."""
    cases = json.loads((reference / "model/head.json").read_text())
    numbers = np.load(reference / "model/head.npz")
    newline = torch.from_numpy(numbers["anyres__image_newline"])
    for case in cases["anyres"]:
        settings = json.loads((reference / "ckpt/llava-tiny-v1.5-7b/config.json").read_text())
        settings |= {
            "mm_patch_merge_type": case["merge"],
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[336, 672], [672, 336]],
            "model_type": "llava_llama",
        }
        config = LlavaConfig.from_dict(settings)
        model = LlavaLlamaForCausalLM.from_pretrained(
            reference / "ckpt/llava-tiny-v1.5-7b", config=config, dtype=torch.float32
        ).eval()
        model.set_vision_tower(load_vision_tower(reference / "ckpt/clip-tiny-336"))
        if case["merge"] == "spatial_unpad":
            model.model.image_newline.data.copy_(newline)
        image = Image.open(reference / "images" / case["image"])
        pixels = process_images([image], model.get_vision_tower().image_processor, config)
        assert list(pixels.shape) == case["pixel_shape"]
        with torch.no_grad():
            ids = torch.tensor([cases["full"][0]["input_ids"]])
            logits = model(ids, images=pixels, image_sizes=[image.size]).logits[0]
        assert len(logits) == case["n_positions"]
        last = torch.from_numpy(numbers[f"{case['key']}__last"])
        torch.testing.assert_close(logits[-1], last, atol=1e-4, rtol=0)


def expanded(ids: torch.Tensor, image_token: int, count: int) -> torch.Tensor:
    """Placeholders as transformers' processor writes them: one id per visual token."""
    return torch.cat([torch.full((count,), image_token) if i == IMAGE else i[None] for i in ids])


def assert_same_answers(ours, theirs, image_token: int, count: int, rows, pixels) -> None:
    used = 0
    for row in rows:
        images = pixels[used : used + int((row == IMAGE).sum())]
        used += len(images)
        ids = expanded(row, image_token, count)[None]
        options = {"pixel_values": images} if len(images) else {}
        with torch.no_grad():
            expected = theirs(input_ids=ids, **options).logits
            found = ours(row[None], images=images).logits
        torch.testing.assert_close(found, expected[..., : found.shape[-1]], atol=1e-4, rtol=0)
        answer = theirs.generate(input_ids=ids, **options, **GREEDY)[:, ids.shape[1] :]
        assert torch.equal(ours.generate(row[None], images=images, **GREEDY), answer)


def test_equals_transformers_llava_on_its_own_checkpoint(reference):
    """The reference's llava-hf directory through both loaders; images squared first, as LLaVA does."""
    path = reference / "ckpt/llava-tiny-1.5-7b-hf"
    _, ours, _, _ = load_pretrained_model(path, device="cpu", dtype="float32", device_map="cpu")
    theirs = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    pixels = pixels_of(ours, reference, ["img0.png", "img1.png", "img2.png"])
    rows = prompts([1, 272, IMAGE, 47], [1, 30, 40], [1, IMAGE, 9, IMAGE, 10])
    # The extra ids of llava-hf (image, padding, filling) are cut off in ours and never the best here.
    assert_same_answers(ours, theirs, theirs.config.image_token_index, 576, rows, pixels)


# One by one


@pytest.mark.parametrize("reducer", ["none", "prumerge", "prumerge+", "topk(tokens=5)"])
def test_a_batch_answers_as_one_by_one(reducer):
    model = make_model(reducer)
    pixels = pictures(4)
    counts = [len(tokens) for tokens in model.encode_images(pixels)]
    if reducer in ("prumerge", "prumerge+"):
        assert len(set(counts)) > 1  # the point: different visual lengths in one batch
    together = model.generate(MIXED, images=pixels, **GREEDY)
    assert together.shape == (4, GREEDY["max_new_tokens"])
    ids, mask = left_padded(MIXED)
    padded = model.generate(ids, images=pixels, attention_mask=mask, **GREEDY)
    assert torch.equal(padded, together)
    right = torch.nn.utils.rnn.pad_sequence(MIXED, batch_first=True)
    right_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in MIXED], batch_first=True)
    padded = model.generate(input_ids=right, images=pixels, attention_mask=right_mask, **GREEDY)
    assert torch.equal(padded, together)
    used = 0
    for row, answer in zip(MIXED, together, strict=True):
        images = pixels[used : used + int((row == IMAGE).sum())]
        used += len(images)
        alone = model.generate(row[None], images=images if len(images) else None, **GREEDY)
        assert torch.equal(alone[0], answer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reducer", ["none", "prumerge+"])
def test_a_padded_forward_equals_one_by_one(reducer, side):
    model = make_model(reducer, tokenizer_padding_side=side)
    pixels = pictures(4)
    with torch.no_grad():
        together = model(MIXED, images=pixels).logits
        used = 0
        for row, logits in zip(MIXED, together, strict=True):
            images = pixels[used : used + int((row == IMAGE).sum())]
            used += len(images)
            alone = model(row[None], images=images).logits[0]
            part = logits[-len(alone) :] if side == "left" else logits[: len(alone)]
            torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)


def test_loss_of_a_batch_is_the_mean_over_its_supervised_tokens():
    """Counted by hand: each supervised id is predicted at the position before it in the spliced sample."""
    model = make_model("prumerge+")
    pixels = pictures(4)
    labels = [torch.where(row == IMAGE, 3, row) for row in MIXED]  # a label on an image must not count
    labels[0] = torch.full_like(labels[0], IGNORE_INDEX)
    visual = iter([len(tokens) for tokens in model.encode_images(pixels)])
    images = iter(pixels)
    total, count = 0.0, 0
    with torch.no_grad():
        loss = model(MIXED, images=pixels, labels=labels).loss
        over_24 = model(MIXED, images=pixels, labels=labels, num_items_in_batch=torch.tensor(24)).loss
        for row, label in zip(MIXED, labels, strict=True):
            own = [next(images) for token in row if token == IMAGE]
            logits = model(row[None], images=own).logits[0]
            position = 0
            for token, target in zip(row.tolist(), label.tolist(), strict=True):
                if token != IMAGE and target != IGNORE_INDEX and position > 0:
                    total -= logits[position - 1].log_softmax(0)[target].item()
                    count += 1
                position += next(visual) if token == IMAGE else 1
    assert count == 2 + 4
    assert abs(loss.item() - total / count) < 1e-5
    assert abs(over_24.item() - total / 24) < 1e-5


def test_cached_visual_tokens_stand_for_images():
    model = make_model("prumerge+")
    pixels = pictures(3)
    cached = model.encode_images(pixels)
    assert all(token.shape == (len(token), 32) and not token.requires_grad for token in cached)
    with torch.no_grad():
        expected = model(MIXED[:3], images=pixels).logits
        found = model(MIXED[:3], visual_tokens=cached).logits
    assert torch.equal(found, expected)
    expected = model.generate(MIXED[:3], images=pixels, **GREEDY)
    model.model.vision_tower = None  # nobody asks for it
    assert torch.equal(model.generate(MIXED[:3], visual_tokens=cached, **GREEDY), expected)


def test_images_of_different_sizes():
    model = make_model("prumerge")
    sizes = [(84, 84), (56, 112), (84, 84), (140, 70)]
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(3, *size, generator=generator) for size in sizes]
    ids = prompts([1, IMAGE, IMAGE, 5, IMAGE, IMAGE, 6])
    separate = [model.encode_images(image[None])[0] for image in pixels]
    assert torch.equal(
        model.generate(ids, images=pixels, **GREEDY), model.generate(ids, visual_tokens=separate, **GREEDY)
    )


# generate


def test_generate_as_callers_write_it():
    """The keywords of LLaVA's scripts and of the evaluation harnesses, beams, samples, a streamer."""
    model = make_model("prumerge+")
    pixels = pictures(1)
    ids = MIXED[0][None]
    plain = model.generate(ids, images=pixels, **GREEDY)
    assert plain.shape == (1, 6)
    llava_style = model.generate(
        ids,
        images=pixels.unbind(),
        image_sizes=[(640, 480)],
        do_sample=False,
        temperature=0,
        top_p=None,
        num_beams=1,
        max_new_tokens=6,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(llava_style, plain)
    assert torch.equal(model.generate(inputs=ids, images=pixels[:, None], **GREEDY), plain)  # one crop each

    class Collect(TextStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    model.generate(ids, images=pixels, streamer=streamer, **GREEDY)
    assert streamer.ids == plain[0].tolist() and streamer.ended

    both = prompts([1, 5, IMAGE, 7, 8], [1, IMAGE, 4])
    beams = model.generate(both, images=pictures(2), num_beams=3, **GREEDY)
    for row, image, answer in zip(both, pictures(2), beams, strict=True):
        assert torch.equal(model.generate(row[None], images=[image], num_beams=3, **GREEDY)[0], answer)
    torch.manual_seed(0)
    sampled = model.generate(
        both, images=pictures(2), num_return_sequences=3, **{**GREEDY, "do_sample": True}
    )
    assert sampled.shape == (6, 6)
    output = model.generate(ids, images=pixels, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert torch.equal(output.sequences, plain)


@pytest.mark.filterwarnings("error:.*past_key_values")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_by_its_new_and_its_old_name(name):
    """Whatever transformers is installed: a prompt in two pieces has the logits of the whole."""
    model, row, cache = make_model(), MIXED[0][None], DynamicCache()
    behind = int((row == IMAGE).nonzero()[-1, 1]) + 1
    with torch.no_grad():
        whole = model(row, images=pictures(1)).logits
        model(row[:, :behind], images=pictures(1), use_cache=True, **{name: cache})
        length = cache.get_seq_length()
        rest = model(row[:, behind:], use_cache=True, **{name: cache}).logits
    assert cache.get_seq_length() == whole.shape[1] > length
    torch.testing.assert_close(rest, whole[:, length:])


def test_text_only_equals_llama():
    """No image, no difference: the ids and logits of LlamaForCausalLM with the same weights."""
    model = make_model()
    llama = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    llama.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "mm_projector" not in k and "vision_tower" not in k}
    )
    ids, mask = left_padded(prompts([1, 5, 6], [1, 9, 10, 11, 12]))
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[1:]).logits, llama(ids[1:]).logits, atol=0, rtol=0)
    without_vision = LlavaLlamaForCausalLM(LlavaConfig(**TEXT)).eval()
    without_vision.load_state_dict(llama.state_dict())
    assert torch.equal(without_vision.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_long_prompts_are_cut_as_configured():
    model = make_model(tokenizer_model_max_length=20)
    (row,) = prompts([1, 2, IMAGE, 3])
    cut = model.generate(row[None], images=pictures(1), **GREEDY)
    (tokens,) = model.encode_images(pictures(1))
    expected = model.generate(row[None, :3], visual_tokens=[tokens[:18]], **GREEDY)
    assert torch.equal(cut, expected)


# Training


def test_gradients_reach_what_is_trained():
    model = make_model("prumerge+").train()
    assert not model.get_vision_tower().training
    model(MIXED, images=pictures(4), labels=[row.clamp(min=0) for row in MIXED]).loss.backward()
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("cached", [False, True])
def test_the_projector_takes_part_in_batches_without_images(cached):
    """Else DDP waits for ever for its gradient."""
    model = make_model().train()
    ids = torch.tensor([[1, 5, 6, 0, 0], [1, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    none = {"visual_tokens": []} if cached else {"images": None}
    output = model(ids, attention_mask=mask, labels=labels, **none)
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.mm_projector.parameters())
    with torch.no_grad():
        expected = model.eval()(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("zero3", [False, True])
def test_zero3_runs_the_tower_on_every_rank(monkeypatch, zero3):
    """Under ZeRO-3 a rank without images must still call the partitioned tower."""
    monkeypatch.setattr("llava.model.llava_arch.is_deepspeed_zero3_enabled", lambda: zero3)
    model = make_model("prumerge").train()
    ran = []
    model.get_vision_tower().encoder.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert len(ran) == zero3
    model(torch.tensor([[1, 2, 3]]), visual_tokens=[], labels=torch.tensor([[1, 2, 3]]))
    assert len(ran) == zero3  # with cached tokens no rank has a tower to call


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = make_model("prumerge+").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        output = model(MIXED, images=pictures(4), labels=[row.clamp(min=0) for row in MIXED], use_cache=False)
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=0)


# On disk and in transformers' machinery


def names_on_disk(directory: Path) -> set[str]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return set(index["weight_map"])


def test_saves_and_loads_like_any_model(tmp_path):
    model = make_model(
        "prumerge+(ratio=0.125)", mm_vision_tower="somewhere/clip", mm_resampler_type="old field"
    )
    expected = model.generate(MIXED, images=pictures(4), **GREEDY)
    model.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    names = names_on_disk(tmp_path / "a")
    assert {
        "model.embed_tokens.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight",
        "lm_head.weight",
    } <= names
    assert len(names) == len(model.state_dict())

    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert isinstance(config, LlavaConfig) and config.model_type == "llava_llama"
    assert config.mm_token_reducer == "prumerge+(ratio=0.125)" and config.mm_resampler_type == "old field"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert isinstance(loaded, LlavaLlamaForCausalLM) and not report["missing_keys"]
    assert loaded.get_vision_tower() is None  # it comes from its own path
    assert loaded.reducer.spec == "prumerge+(ratio=0.125)"
    loaded.eval().set_vision_tower(make_tower())
    assert torch.equal(loaded.generate(MIXED, images=pictures(4), **GREEDY), expected)

    loaded.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    assert names_on_disk(tmp_path / "b") == names
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert first == second


def test_what_a_checkpoint_lacks_is_new_and_the_rest_stays(tmp_path):
    model = make_model(mm_patch_merge_type="spatial_unpad")
    state = {name: tensor for name, tensor in model.state_dict().items() if "mm_projector" not in name}
    model.save_pretrained(tmp_path / "without_projector", state_dict=state)
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "without_projector")
    assert torch.equal(loaded.model.image_newline, model.model.image_newline)
    assert 0 < loaded.model.mm_projector[0].weight.std() < 1
    state = {name: tensor for name, tensor in model.state_dict().items() if "image_newline" not in name}
    model.save_pretrained(tmp_path / "without_newline", state_dict=state)
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "without_newline")
    assert torch.equal(loaded.model.mm_projector[0].weight, model.model.mm_projector[0].weight)
    assert 0.5 < loaded.model.image_newline.std() * 64**0.5 < 2


def test_config_fields_are_typed():
    old = LlavaConfig.from_dict({"mm_resampler_type": None, "rope_theta": 1e5, "mm_projector_lr": 2e-5})
    assert old.mm_resampler_type is None and old.rope_parameters["rope_theta"] == 1e5
    assert old.mm_token_reducer == "none" and old.mm_use_im_patch_token
    for field, value in {
        "mm_vision_select_layer": "-2",
        "mm_hidden_size": 1.5,
        "mm_patch_merge_type": "circular",
    }.items():
        with pytest.raises(Exception, match=field):
            LlavaConfig(**{field: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = make_model()
    with torch.no_grad():
        full = model(MIXED, images=pictures(4)).logits
        half = model.to(dtype)(MIXED, images=pictures(4)).logits
    assert half.dtype == dtype
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()
    model.set_reducer("prumerge+")  # may choose other patches than in float32, so: it runs
    assert model.generate(MIXED, images=pictures(4), **GREEDY).shape == (4, 6)


# Bad input


@pytest.mark.parametrize(("row", "count"), [(MIXED[1], 1), (MIXED[0], 2), (MIXED[2], 1), (MIXED[0], 0)])
def test_images_and_placeholders_must_match(row, count):
    model = make_model()
    for call in (model, model.generate):
        with pytest.raises(UserError, match=rf"{int((row == IMAGE).sum())} <image>.* {count} images"):
            call(row[None], images=pictures(count))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(value):
    pixels = pictures(2)
    pixels[1, 0, 3, 3] = value
    with pytest.raises(UserError, match="NaN"):
        make_model().encode_images(pixels)


def test_what_cannot_work_says_so():
    model = make_model()
    with pytest.raises(UserError, match="prumrge"):
        model.set_reducer("prumrge")
    assert model.reducer.spec == model.config.mm_token_reducer == "none"
    with pytest.raises(UserError, match="visual_tokens"):
        model(MIXED[0][None], images=pictures(1), visual_tokens=model.encode_images(pictures(1)))
    with pytest.raises(UserError, match="prompt"):
        model.generate(images=pictures(1))
    model.set_vision_tower(make_tower(select_feature="cls_patch"))
    assert len(model.encode_images(pictures(1))[0]) == VISUAL_TOKENS + 1
    model.set_reducer("prumerge")
    with pytest.raises(UserError, match="cls_patch"):
        model.encode_images(pictures(1))
    wide = CLIPVisionModel(CLIPVisionConfig(**VISION | {"hidden_size": 48}))
    with pytest.raises(UserError, match=r"32.*48"):
        model.set_vision_tower(VisionTower(wide))
    model.model.vision_tower = None
    with pytest.raises(UserError, match="vision tower"):
        model.generate(MIXED[0][None], images=pictures(1))
