"""Reducers inside transformers' own LLaVA classes: what a model gives, and that nothing else changes.

Everything is compared with the untouched class: on the embeddings that a slow version, written out below with
transformers' whole towers, makes of the picture.
"""

import copy
import pickle
import re
import runpy
import sys

import pytest
import torch
import transformers as tf
from PIL import Image
from plug_models import (
    IMAGE,
    KINDS,
    PAD,
    SIDE,
    TEXT,
    VIDEO_KINDS,
    VISION,
    Row,
    batch,
    build,
    lengths_seen,
    pixels_of,
    processor,
)
from torch.nn import functional as F

from llava.model.builder import load_pretrained_model
from llava.plug import reduce_tokens, restore
from llava.reducers import VisionFeatures, build_reducer

GREEDY = {"max_new_tokens": 6, "do_sample": False}
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in VIDEO_KINDS]
"""Each class with an image, and with a video of three frames where it takes videos."""
cases = pytest.mark.parametrize(("kind", "video"), CASES)


FIXED = "prumerge+(tokens=12)"


def mixed(video: bool) -> list[Row]:
    """Rows that differ in their text and in their pictures."""
    return [Row(1, 5, 4, video), Row(2, 3, 9, video, size=(100, 200)), Row(3, 6, 6, video)]


@torch.no_grad()
def tokens_by_hand(model, kind: str, row: Row, spec: str) -> torch.Tensor:
    """[K, hidden] the visual tokens of a row: transformers' whole tower, tile by tile, frame by frame."""
    body, pixels = model.model, pixels_of(kind, row)
    frames = next(iter(pixels.values()))[0]
    if "image_sizes" in pixels:
        frames = frames[: 3 if row.size == (100, 200) else 5]
    tower = getattr(body, "vision_tower", None) or (body.video_tower if row.video else body.image_tower)
    layers = getattr(model.config, "vision_feature_layer", None) or model.config.vision_feature_layers
    layers = layers if isinstance(layers, list) else [layers]
    has_cls, parts = kind != "LlavaOnevision", []
    for frame in frames if frames.ndim == 4 else frames[None]:
        states = tower(frame[None], output_hidden_states=True).hidden_states
        selected = torch.cat([states[layer] for layer in layers], dim=-1)
        last = tower.encoder.layers[-1]
        normed = last.layer_norm1(states[-2])
        key, queries, grid = last.self_attn.k_proj(normed), last.self_attn.q_proj(normed), (8, 8)
        patches = selected[:, 1:] if has_cls else selected
        if row.video and kind == "LlavaNextVideo":
            patches, grid = body.vision_resampler(patches), (4, 4)
            pooled = F.avg_pool2d(key[:, 1:].transpose(1, 2).reshape(1, -1, 8, 8), 2)
            key = torch.cat([key[:, :1], pooled.flatten(2).transpose(1, 2)], dim=1)
        # SigLIP has no CLS token, and this one no pooling head: the mean of the patches' queries scores.
        query = {"query": queries[:, 0]} if has_cls else {"query": None, "mean_query": queries.mean(1)}
        features = VisionFeatures(patches=patches, key=key, num_heads=4, grid=grid, **query)
        reduced = build_reducer(spec)(features).unbind()[0]
        if row.video and kind == "VideoLlava":
            reduced = torch.cat([selected[0, :1], reduced])
        parts.append(body.multi_modal_projector(reduced))
    if row.video and kind == "LlavaOnevision":
        parts.append(body.image_newline[None])
    return torch.cat(parts)


@torch.no_grad()
def embeds_by_hand(model, kind: str, row: Row, spec: str) -> torch.Tensor:
    """[1, L, hidden] what the language model should see of one prompt."""
    ids = batch(kind, [row])["input_ids"][0]
    text = model.get_input_embeddings()(ids[ids < 110])
    before, after = text[: row.before], text[row.before :]
    return torch.cat([before, tokens_by_hand(model, kind, row, spec), after])[None]


# What a reduced model gives


@cases
@torch.no_grad()
def test_none_is_the_untouched_model_bit_for_bit(kind, video):
    model, inputs = build(kind), batch(kind, mixed(video))
    logits, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    reduce_tokens(model, "none")
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), answer)


@pytest.mark.parametrize(("kind", "video"), [c for c in CASES if c[0] in ("Llava", "VipLlava", "VideoLlava")])
@torch.no_grad()
def test_keeping_every_patch_changes_nothing(kind, video):
    model, inputs = build(kind), batch(kind, mixed(video))
    logits = model(**inputs).logits
    found = reduce_tokens(model, "grid(tokens=64)")(**inputs).logits
    counts = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[counts], logits[counts], atol=1e-4, rtol=0)


@cases
@torch.no_grad()
def test_equals_the_untouched_class_on_embeddings_made_by_hand(kind, video):
    """Logits, greedy answers and beams, one by one; then the same rows as one batch."""
    spec, model, rows = "prumerge", build(kind), mixed(video)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    expected = []
    for row in rows:
        embeds = embeds_by_hand(model, kind, row, spec)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        short = {"inputs_embeds": embeds, "attention_mask": mask}
        answers = (model.generate(**short, **options) for options in (GREEDY, beams))
        expected.append((model(**short).logits, *answers))
    assert len({logits.shape[1] for logits, _, _ in expected}) > 1

    reduce_tokens(model, spec)
    for row, (logits, greedy, beam) in zip(rows, expected, strict=True):
        one = batch(kind, [row])
        torch.testing.assert_close(model(**one).logits, logits, atol=1e-4, rtol=0)
        assert torch.equal(model.generate(**one, **GREEDY), torch.cat([one["input_ids"], greedy], dim=1))
        assert torch.equal(model.generate(**one, **beams)[:, one["input_ids"].shape[1] :], beam)
    for side in ("left", "right"):
        inputs = batch(kind, rows, side)
        logits, length = model(**inputs).logits, inputs["input_ids"].shape[1]
        assert logits.shape[1] < length
        for row, (alone, _, _) in zip(logits, expected, strict=True):
            row = row[-alone.shape[1] :] if side == "left" else row[: alone.shape[1]]
            torch.testing.assert_close(row, alone[0], atol=1e-4, rtol=0)
    inputs = batch(kind, rows)
    greedy, beam = model.generate(**inputs, **GREEDY), model.generate(**inputs, **beams)
    assert torch.equal(greedy[:, :length], inputs["input_ids"])
    assert torch.equal(greedy[:, length:], torch.cat([greedy for _, greedy, _ in expected]))
    assert torch.equal(beam[:, length:], torch.cat([beam for _, _, beam in expected]))


@cases
@torch.no_grad()
def test_the_answer_depends_on_the_picture(kind, video):
    """Else the comparisons above would hold for a model that never looks."""
    model = reduce_tokens(build(kind), FIXED)
    answers = set()
    for seed in range(3):
        inputs = batch(kind, [Row(9, 5, 4, video)]) | pixels_of(kind, Row(seed, 5, 4, video))
        answers.add(tuple(model.generate(**inputs, **GREEDY)[0, -6:].tolist()))
    assert len(answers) > 1


@torch.no_grad()
def test_images_and_videos_in_one_batch_in_any_order():
    kind, spec = "LlavaNextVideo", "prumerge"
    rows = [Row(1, 5, 4, video=True), Row(2, 3, 9), Row(3, 6, 6, video=True)]
    model = build(kind)
    expected = [model(inputs_embeds=embeds_by_hand(model, kind, row, spec)).logits[0, -1] for row in rows]
    logits = reduce_tokens(model, spec)(**batch(kind, rows)).logits
    torch.testing.assert_close(logits[:, -1], torch.stack(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_images_side_by_side_in_one_prompt():
    """Two images in one run of placeholders, then text only, in one batch."""
    kind, spec, model = "Llava", "prumerge", build("Llava")
    first, second = (tokens_by_hand(model, kind, Row(seed, 0, 0), spec) for seed in (1, 2))
    ids = torch.tensor([[5] + [IMAGE] * 128 + [6, 7], [PAD] * 127 + [8, 9, 10, 11]])
    text = model.get_input_embeddings()(torch.tensor([5, 6, 7]))
    alone = model(inputs_embeds=torch.cat([text[:1], first, second, text[1:]])[None]).logits
    plain = model(input_ids=torch.tensor([[8, 9, 10, 11]])).logits
    pixels = torch.cat([pixels_of(kind, Row(seed, 0, 0))["pixel_values"] for seed in (1, 2)])
    mask = (ids != PAD).long()
    logits = reduce_tokens(model, spec)(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    torch.testing.assert_close(logits[0], alone[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, -4:], plain[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_onevision_gives_each_of_several_images_one_tile():
    model = build("LlavaOnevision")
    pixels = torch.randn(2, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[5] + [IMAGE] * 65 + [6] + [IMAGE] * 65 + [7]])  # untouched: a line end each
    inputs = {"input_ids": ids, "pixel_values": pixels, "batch_num_images": torch.tensor([2])}
    inputs["image_sizes"] = torch.tensor([[200, 200], [100, 200]])
    assert model(**inputs).logits.shape[1] == ids.shape[1]
    seen = lengths_seen(reduce_tokens(model, "pool(tokens=9)"))
    model(**inputs)
    assert seen == [3 + 2 * 9]


@pytest.mark.parametrize("spec", ["none", "prumerge", "prumerge+"])
@torch.no_grad()
def test_golden_checkpoint_equals_our_own_path(golden, spec):
    path = golden / "llava/ckpt/llava-tiny-1.5-7b-hf"
    _, ours, _, _ = load_pretrained_model(path, None, path.name, device="cpu", dtype="float32", reducer=spec)
    plugged = tf.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    reduce_tokens(plugged, spec)
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(7))
    for image in pixels.split(1):
        ids = torch.tensor([[1, 5, 17, -200, 33, 80, 4]])
        long = torch.cat([ids[:, :3], torch.full((1, 576), plugged.config.image_token_id), ids[:, 4:]], dim=1)
        expected, found = ours(ids, images=image).logits, plugged(input_ids=long, pixel_values=image).logits
        # The extra ids of llava-hf are cut off in ours.
        torch.testing.assert_close(found[..., : expected.shape[2]], expected, atol=1e-4, rtol=0)
        answer = ours.generate(ids, images=image, max_new_tokens=8, do_sample=False)
        extra = list(range(expected.shape[2], found.shape[2]))
        again = plugged.generate(
            long, pixel_values=image, max_new_tokens=8, do_sample=False, suppress_tokens=extra
        )
        assert torch.equal(again[:, long.shape[1] :], answer)


# Generation


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy_is_repeated_forwards_without_a_cache(kind):
    model, inputs = reduce_tokens(build(kind), "prumerge"), batch(kind, mixed(False))
    found = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    for step in found.logits:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits[:, -1]
        torch.testing.assert_close(step, logits, atol=1e-4, rtol=0)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(found.sequences, ids)


@torch.no_grad()
def test_lengths_are_those_of_the_prompt_as_given():
    """max_length, min_length and a streamer count the placeholders, as in the untouched class."""
    kind, model = "Llava", reduce_tokens(build("Llava"), "prumerge")
    inputs = batch(kind, mixed(False))
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_length=length + 3, do_sample=False).shape[1] == length + 3
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    ends = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": first.tolist()}
    assert model.generate(**inputs, **ends).shape[1] == length + 1
    assert model.generate(**inputs, **ends, min_length=length + 4).shape[1] >= length + 4
    assert model.generate(**inputs, **ends, min_new_tokens=4).shape[1] >= length + 4
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_a_streamer_gets_the_prompt_as_given_and_then_the_answer(capsys):
    model, inputs, tokenizer = (
        reduce_tokens(build("Llava"), FIXED),
        batch("Llava", [Row(1, 5, 4)]),
        processor().tokenizer,
    )
    for skip in (False, True):
        said = model.generate(**inputs, **GREEDY, streamer=tf.TextStreamer(tokenizer, skip_prompt=skip))[0]
        shown = said[inputs["input_ids"].shape[1] :] if skip else said
        assert capsys.readouterr().out.split() == tokenizer.decode(shown).split()


def longest_without_image() -> dict[str, torch.Tensor]:
    """Reduced, the batch is as long as before, but its other row is padded by more."""
    picture = batch("Llava", [Row(1, 5, 4)])
    text = torch.randint(3, 110, (1, 80), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([F.pad(picture["input_ids"], (80 - 73, 0), value=PAD), text])
    return picture | {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.mark.parametrize(
    "inputs", [batch("Llava", mixed(False)), longest_without_image()], ids=["images", "a text"]
)
@torch.no_grad()
def test_a_loop_written_by_hand_with_the_long_mask(inputs):
    """prefill, then one id at a time with the cache that came back."""
    model = reduce_tokens(build("Llava"), "prumerge")
    expected = model.generate(**inputs, **GREEDY)[:, -6:]
    output, mask, answer = model(**inputs), inputs["attention_mask"], []
    for _ in range(6):
        answer.append(output.logits[:, -1].argmax(-1, keepdim=True))
        mask = F.pad(mask, (0, 1), value=1)
        output = model(input_ids=answer[-1], attention_mask=mask, past_key_values=output.past_key_values)
    assert torch.equal(torch.cat(answer, dim=1), expected)


@pytest.mark.parametrize("rows", [mixed(False), mixed(False)[:1]], ids=["batch", "alone"])
@pytest.mark.parametrize("again", ["text", "image"])
@torch.no_grad()
def test_a_second_turn_on_the_cache_of_the_first(again, rows):
    """`generate` with the whole conversation and the cache equals one without the cache."""
    kind, model = "Llava", reduce_tokens(build("Llava"), "prumerge")
    inputs, count = batch(kind, rows), len(rows)
    cache = tf.DynamicCache(config=model.config)
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    question = torch.randint(3, 110, (count, 4), generator=torch.Generator().manual_seed(1))
    pictures, new = [inputs["pixel_values"]], {}
    if again == "image":
        picture = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        question = torch.cat([question, torch.full((count, 64), IMAGE), question[:, :2]], dim=1)
        # In the order of the prompts: each row's first image, then its second.
        pictures, new = [torch.stack([pictures[0], picture], dim=1).flatten(0, 1)], {"pixel_values": picture}
    ids = torch.cat([first, question], dim=1)
    mask = F.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["attention_mask"].shape[1]), value=1)
    expected = model.generate(ids, attention_mask=mask, pixel_values=pictures[0], **GREEDY)
    kept = copy.deepcopy(cache)
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **new, **GREEDY)
    assert torch.equal(found, expected)
    # The last new token of the first answer is not in the cache: it comes with the question.
    new_ids = ids[:, inputs["input_ids"].shape[1] + 5 :]
    logits = model(input_ids=new_ids, attention_mask=mask, past_key_values=kept, **new).logits[:, -1]
    assert torch.equal(logits.argmax(-1), expected[:, ids.shape[1]])


@torch.no_grad()
def test_a_prefix_of_text_in_the_users_cache():
    """The system prompt is computed once; every question starts from a copy."""
    kind, model = "Llava", reduce_tokens(build("Llava"), "prumerge")
    inputs = batch(kind, [Row(1, 9, 4)])
    expected = model.generate(**inputs, **GREEDY)
    prefix = model(input_ids=inputs["input_ids"][:, :7]).past_key_values
    for _ in range(2):
        found = model.generate(**inputs, **GREEDY, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(found, expected)
    output = model(
        input_ids=inputs["input_ids"][:, 7:],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"],
        past_key_values=prefix,
    )
    assert output.logits[0, -1].argmax() == expected[0, -6]


# What stays as it was


def state_of(model) -> dict:
    inner = model.model
    return {
        "type": type(model),
        "attributes": {n: v for n, v in vars(model).items() if not n.startswith("_")},
        "weights": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "hooks": [
            h for hooks in (model._forward_pre_hooks, inner._forward_pre_hooks) for h in hooks.values()
        ],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_restore_leaves_no_trace(kind, tmp_path):
    model, inputs = build(kind), batch(kind, mixed(False))
    model.model.multi_modal_projector.train()
    model.get_input_embeddings().requires_grad_(False)
    model.save_pretrained(tmp_path)  # this alone writes `architectures` into the config
    before, answer = state_of(model), model.generate(**inputs, **GREEDY)
    assert restore(reduce_tokens(reduce_tokens(model, "pool"), FIXED)) is model
    model.generate(**inputs, **GREEDY)
    reduce_tokens(model, FIXED)
    model.generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path)
    assert type(model).__name__ == before["type"].__name__ and isinstance(model, before["type"])
    assert state_of(model)["gradients"] == before["gradients"]
    assert state_of(model)["training"] == before["training"]
    restore(model)
    assert state_of(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), answer)


def test_a_checkpoint_records_its_reducer(tmp_path):
    kind, model = "LlavaNext", reduce_tokens(build("LlavaNext"), "prumerge+(tokens=12)")
    inputs = batch(kind, mixed(False))
    answer = model.generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is tf.LlavaNextForConditionalGeneration
    again.generation_config.eos_token_id = None
    reduce_tokens(again)
    assert again.reducer == model.reducer
    assert torch.equal(again.generate(**inputs, **GREEDY), answer)
    reduce_tokens(again, "pool(tokens=9)").save_pretrained(tmp_path)
    assert (
        reduce_tokens(tf.LlavaNextForConditionalGeneration.from_pretrained(tmp_path)).reducer.spec
        == "pool(tokens=9)"
    )


def test_copies_and_pickles_reduce_as_well():
    kind, model = "Llava", reduce_tokens(build("Llava"), "prumerge")
    inputs = batch(kind, mixed(False))
    answer = model.generate(**inputs, **GREEDY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other is not model and other.reducer == model.reducer
        assert torch.equal(other.generate(**inputs, **GREEDY), answer)
        restore(other)
        assert type(other) is tf.LlavaForConditionalGeneration


def test_weights_that_accelerate_keeps_elsewhere(tmp_path):
    """On disk, some of the tower's layers too: between calls such weights are on the meta device. Hooks are
    set before the reducer, then after it."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    model, inputs = build("Llava"), batch("Llava", mixed(False))
    model.save_pretrained(tmp_path / "model")
    dense = model.generate(**inputs, **GREEDY)
    expected = reduce_tokens(model, "prumerge").generate(**inputs, **GREEDY)
    offloaded = tf.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path / "disk"
    )
    offloaded.generation_config.eos_token_id = None
    assert {p.device.type for p in offloaded.model.vision_tower.parameters()} == {"cpu", "meta"}
    assert torch.equal(reduce_tokens(offloaded, "prumerge").generate(**inputs, **GREEDY), expected)
    assert torch.equal(restore(offloaded).generate(**inputs, **GREEDY), dense)

    model = cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert torch.equal(restore(model).generate(**inputs, **GREEDY), dense)


def test_weights_of_four_bits(tmp_path):
    """Against the same quantised model, untouched, on embeddings made by hand."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = tf.CLIPVisionConfig(**VISION | {"hidden_size": 64, "intermediate_size": 128})
    build("Llava", vision_config=wide).save_pretrained(tmp_path)
    config, row = tf.BitsAndBytesConfig(load_in_4bit=True), Row(1, 5, 4)
    model = tf.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    )
    with torch.no_grad():
        expected = model(inputs_embeds=embeds_by_hand(model, "Llava", row, "pool(tokens=9)")).logits
        found = reduce_tokens(model, "pool(tokens=9)")(**batch("Llava", [row])).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_subclass_of_the_users():
    class Mine(tf.LlavaForConditionalGeneration):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model, inputs = build("Llava"), batch("Llava", mixed(False))
    model.__class__ = Mine
    seen = lengths_seen(reduce_tokens(model, "pool(tokens=9)"))
    model(**inputs)
    assert max(seen) < 30
    assert type(restore(model)) is Mine


# Bad input


@pytest.mark.parametrize(
    ("model", "spec", "says"),
    [
        (
            lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
            "prumerge",
            "LlavaNextForConditionalGeneration",
        ),
        (lambda: build("Llava"), "prumerg", "prumerge"),
        (lambda: build("Llava"), "topk(tokens=0)", "tokens"),
        (lambda: build("Llava"), "nowhere.py:mine", "nowhere.py"),
        (lambda: build("Llava"), None, "records no reducer"),
        (lambda: build("LlavaOnevision"), "visionzip", "cls"),
        (
            lambda: build("Llava", vision_config=tf.PixtralVisionConfig(**VISION)),
            "pool",
            "pixtral",
        ),
    ],
)
def test_what_cannot_be_reduced_is_left_as_it_was(model, spec, says):
    model = model()
    before = vars(model).copy(), type(model), dict(model.base_model._forward_pre_hooks)
    with pytest.raises(ValueError, match=says):
        reduce_tokens(model, spec)
    assert before == (vars(model), type(model), dict(model.base_model._forward_pre_hooks))
    with pytest.raises(ValueError, match="not reduced"):
        restore(model)


def bad_changes() -> dict[str, dict[str, torch.Tensor | None]]:
    """By what is wrong: changes to a batch that is right."""
    good = batch("Llava", mixed(False))
    ids, mask, pixels = good["input_ids"], good["attention_mask"], good["pixel_values"]
    place = int((ids[0] == IMAGE).nonzero()[0])
    dropped, torn = ids.clone(), ids.clone()
    dropped[0, 20], torn[0, place - 1], torn[0, place + 10] = 5, IMAGE, 5
    return {
        "a placeholder dropped": {"input_ids": dropped},
        "placeholders apart": {"input_ids": torn},
        "the image id of another model": {"input_ids": ids.where(ids != IMAGE, 119)},
        "twice the images": {"pixel_values": torch.cat([pixels, pixels])},
        "prompts cut off": {"input_ids": ids[:, :40], "attention_mask": mask[:, :40]},
        "packed positions": {"position_ids": torch.arange(ids.shape[1]).expand_as(ids) % 20},
        "a short mask": {"attention_mask": mask[:, 1:]},
        "indices of logits": {"logits_to_keep": torch.tensor([3])},
        "embeddings": {"input_ids": None, "inputs_embeds": torch.zeros(*ids.shape, TEXT["hidden_size"])},
    }


@pytest.mark.parametrize("wrong", bad_changes())
def test_prompts_and_images_that_do_not_fit(wrong):
    model, inputs = reduce_tokens(build("Llava"), "pool(tokens=9)"), batch("Llava", mixed(False))
    model(**inputs)
    with pytest.raises(ValueError):
        model(**inputs | bad_changes()[wrong])


def test_sizes_that_anyres_needs():
    model, inputs = reduce_tokens(build("LlavaNext"), "pool(tokens=9)"), batch("LlavaNext", mixed(False))
    sizes = inputs.pop("image_sizes")
    with pytest.raises(ValueError, match="image_sizes"):
        model(**inputs)
    with pytest.raises(ValueError):
        model(**inputs, image_sizes=sizes.flip(0)[:2])


@pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"])
def test_generation_that_counts_by_the_long_prompt_is_refused(name):
    model, inputs = reduce_tokens(build("Llava"), "pool(tokens=9)"), batch("Llava", [Row(1, 5, 4)])
    with pytest.raises(ValueError, match="reduced model"):
        model.generate(**inputs, **GREEDY, **{name: build("Llava") if name == "assistant_model" else 3})


def test_pixels_cannot_pass_the_reducer_by():
    model, inputs = build("Llava"), batch("Llava", [Row(1, 5, 4)])
    reduce_tokens(model, "pool(tokens=9)")
    with pytest.raises(ValueError, match="body"):
        model.model(**inputs)
    restore(model).model(**inputs)


def test_a_cache_that_was_cropped():
    model, inputs = reduce_tokens(build("Llava"), "pool(tokens=9)"), batch("Llava", [Row(1, 5, 4)])
    cache = model(**inputs).past_key_values
    cache.crop(-8)
    with pytest.raises(ValueError, match="cropped"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


# The page


def test_the_code_of_the_page_runs(root, tmp_path, monkeypatch, capsys):
    page = (root / "docs/plug.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    build("Llava").save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    Image.effect_noise((200, 150), 60).convert("RGB").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace("llava-hf/llava-1.5-7b-hf", "model")
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].reducer.spec == "prumerge+(tokens=144)"
    assert type(scope["again"]) is tf.LlavaForConditionalGeneration
    assert scope["answer"].shape[1] == scope["inputs"]["input_ids"].shape[1] + 20


def test_the_benchmark_of_the_page_runs(root, monkeypatch, capsys):
    """One layer of each; the numbers of positions are those of the reducers."""
    small = "--shape mini --layers 1 --tower-layers 1 --text 8 --rounds 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bench_plug.py", *small.split()])
    runpy.run_path(str(root / "scripts/bench_plug.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[3:]
    positions = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert positions == {"untouched": 584, "prumerge+(tokens=144)": 153, "prumerge(tokens=32)": 41}
