"""The engine: batches and shared openings change no answer, a bad question ends no other, streams."""

import base64
import io
import multiprocessing
import os
import select
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import HIDDEN, edit_json, family, single_safetensors, write_json

from llava.conversation import conv_templates
from llava.engine import Answer, LocalEngine, ModelSource, Request, finish
from llava.engine import local as engine_module
from llava.engine.streaming import TextStream
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model import prefix
from llava.pixels import decode, in_workers

NEW = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tiny = family(tmp_path_factory.mktemp("tiny"))
    # Random weights would say bytes that are no text.
    write_json(tiny.full / "generation_config.json", {"suppress_tokens": list(range(3, 259))})
    return tiny


@pytest.fixture(scope="module")
def loaded(tiny):
    return ModelSource(str(tiny.full), conv_mode="vicuna_v1", device="cpu", reducer="prumerge").load()


@pytest.fixture
def engine(loaded):
    """Fresh budgets over the same weights."""
    loaded.model.set_reducer("prumerge")
    return with_options(loaded)


def with_options(engine: LocalEngine, conv_mode: str = "vicuna_v1", **options) -> LocalEngine:
    return LocalEngine(engine.model, engine.tokenizer, engine.image_processor, conv_mode, **options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures of several sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        shape = (20 + 7 * number, 90 - 5 * number, 3)
        pixels = (torch.rand(shape, generator=generator) ** 2 * 255).to(torch.uint8).numpy()
        image = Image.fromarray(pixels)
        (image.convert("L") if number == 3 else image).save(folder / f"{number}.png")
    return folder


def questions(pictures: Path, count: int = 40) -> list[Request]:
    """Questions of many lengths about eight pictures and about none, about two, and in several turns."""
    requests = []
    for n in range(count):
        image = pictures / f"{n * 5 % 9}.png"
        text = f"{n}: " + "what is it " * (n * 7 % 5)
        requests.append(
            Request(id=n, text=text, images=[image] if image.exists() else [], max_new_tokens=NEW)
        )
    both = [pictures / "1.png", pictures / "2.png"]
    turns = [("user", "And this?"), ("assistant", "A cat."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    requests.append(Request(id="two", text="Is <image> or <image> it?", images=both, max_new_tokens=NEW))
    requests.append(Request(id="turns", messages=messages, images=both[:1], max_new_tokens=NEW))
    return requests


@torch.no_grad()
def one_at_a_time(engine: LocalEngine, requests: list[Request], *, cut: bool = True) -> dict:
    """The slow way: images and question by themselves, through the pixels, in one plain generate call."""
    answers = {}
    for request in requests:
        ids = tokenizer_image_token(engine.prompt(request), engine.tokenizer, return_tensors="pt")[None]
        given = {}
        if request.images:
            images = [load_image(image) for image in request.images]
            given["images"] = process_images(images, engine.image_processor, engine.model.config)
            given["image_sizes"] = [image.size for image in images]
        new = engine.model.generate(
            ids, **given, do_sample=False, max_new_tokens=request.max_new_tokens, pad_token_id=0
        )
        text = engine.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        answers[request.id] = text.split(engine.stop)[0].strip() if cut and engine.stop else text
    return answers


def texts(answers) -> dict:
    answers = list(answers)
    assert [one.problem for one in answers if one.problem] == []
    return {one.id: one.text for one in answers}


# --- many requests ---


def test_batches_answer_as_one_at_a_time(engine, pictures):
    requests = questions(pictures, 24)
    slow = one_at_a_time(engine, requests)
    assert len(set(slow.values())) > 10  # the answers tell the questions apart
    for tokens, workers in ((1, 0), (1200, 0), (100_000, 2)):
        fast = with_options(engine, batch_tokens=tokens, decode_workers=workers)
        assert texts(fast.answer(requests)) == slow, tokens


@pytest.mark.parametrize("conv_mode", ["v1_mmtag", "llava_llama_2", "mpt"])
def test_templates_of_every_kind(engine, pictures, conv_mode):
    engine = with_options(engine, conv_mode)
    requests = questions(pictures, 12)
    assert texts(engine.answer(requests)) == one_at_a_time(engine, requests)


@pytest.mark.parametrize(("anyres", "reducer"), [("tile", None), ("papers", "topk(tokens=40)")])
def test_joined_tiles(tiny, pictures, tmp_path, anyres, reducer):
    """LLaVA-1.6's pictures: several crops each, joined after the projector."""
    shutil.copytree(tiny.root, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / tiny.full.name
    edit_json(
        path / "config.json",
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    newline = {"model.image_newline": torch.full((HIDDEN,), 0.3)}
    single_safetensors(path, tiny.language_model | tiny.projector_weights | newline)
    options = {"conv_mode": "vicuna_v1", "device": "cpu", "anyres": anyres, "reducer": reducer}
    engine = ModelSource(str(path), **options).load()
    requests = questions(pictures, 12)
    slow = one_at_a_time(engine, requests)
    answers = list(engine.answer(requests))
    assert texts(answers) == slow and len(set(slow.values())) > 5
    assert min(one.visual_tokens[0] for one in answers if one.visual_tokens) > 16  # the copy, tiles, newlines
    encoded = engine.encode(requests[0].images)
    assert finish(engine.stream(replace(requests[0], images=encoded))).text == slow[0]


def test_what_is_shared_is_computed_once(engine, pictures, monkeypatch):
    """The system prompt once, an image once in all, a question its own words; tokens are counted right."""
    requests = [one for one in questions(pictures, 72) if len(one.images) == 1 and not one.messages]
    begun, seen, asked, encoded = [], [], [], []
    begin, extend, answer = prefix.begin, prefix.extend, prefix.answer
    encode = engine.model.encode_images

    def counting_begin(model, ids):
        begun.append(len(ids))
        return begin(model, ids)

    def counting_extend(model, start, blocks, rows):
        seen.extend(map(len, blocks))
        return extend(model, start, blocks, rows)

    def counting_answer(model, beginnings, ids, rows, **arguments):
        asked.extend(map(len, ids))
        return answer(model, beginnings, ids, rows, **arguments)

    monkeypatch.setattr(prefix, "begin", counting_begin)
    monkeypatch.setattr(prefix, "extend", counting_extend)
    monkeypatch.setattr(prefix, "answer", counting_answer)

    def counting_encode(pixels, *how):
        encoded.append(len(pixels))
        return encode(pixels, *how)

    monkeypatch.setattr(engine.model, "encode_images", counting_encode)
    tokens = {str(r.images[0]): a.visual_tokens for r, a in in_order(requests, engine.answer(requests))}
    assert sum(encoded) == 8 and len(begun) == 1
    head = begun[0]
    assert sorted(seen) == sorted([head, *(count for (count,) in tokens.values())])
    whole = [len(tokenizer_image_token(engine.prompt(one), engine.tokenizer)) for one in requests]
    assert sum(asked) == sum(whole) - len(requests) * (head + 1)


def in_order(requests, answers):
    by_id = {one.id: one for one in answers}
    return [(request, by_id[request.id]) for request in requests]


def test_out_of_memory_halves_the_budget_and_goes_on(engine, pictures, monkeypatch):
    requests, model = questions(pictures), engine.model
    whole = texts(engine.answer(requests))
    answer, extend, encode = prefix.answer, prefix.extend, model.encode_images
    refused = []

    def at_most(rows, size):
        if size > rows:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory")

    def small_answer(model, beginnings, ids, rows, **arguments):
        at_most(3, len(ids))
        return answer(model, beginnings, ids, rows, **arguments)

    def small_extend(model, start, blocks, rows):
        at_most(2, len(blocks))
        return extend(model, start, blocks, rows)

    def small_encode(pixels, *how):
        at_most(2, len(pixels))
        return encode(pixels, *how)

    monkeypatch.setattr(prefix, "answer", small_answer)
    monkeypatch.setattr(prefix, "extend", small_extend)
    monkeypatch.setattr(model, "encode_images", small_encode)
    assert texts(with_options(engine).answer(requests)) == whole
    assert 3 <= len(refused) < 20
    # What does not fit alone is a problem of its own.
    longest = max(requests[:40], key=lambda one: len(one.text))

    def no_room_for_one(model, beginnings, ids, rows, **arguments):
        at_most(0, max(map(len, ids)) > len(longest.text))
        return answer(model, beginnings, ids, rows, **arguments)

    monkeypatch.setattr(prefix, "answer", no_room_for_one)
    answers = list(with_options(engine).answer(requests))
    problems = {one.id for one in answers if one.problem}
    assert longest.id in problems and len(answers) == len(requests) > 2 * len(problems)
    assert all("memory" in one.problem for one in answers if one.problem)


def test_what_is_wrong_with_one_request_ends_no_other(engine, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "1.png").read_bytes()[:200])
    picture = io.BytesIO()
    Image.open(pictures / "1.png").save(picture, "PNG")
    embedded = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    first = questions(pictures)[2]
    wrong = {
        "broken": replace(first, images=[broken]),
        "missing.png": replace(first, images=[tmp_path / "missing.png"]),
        "base64": replace(first, images=["data:image/png;base64,no base64!"]),
        "<image>": replace(first, text="<image> what is <image>?"),
        "no pictures": replace(first, text="what is <image>?", images=[]),
        "user": replace(first, messages=[{"role": "assistant", "content": "Hi"}]),
        "tokens long": replace(first, text="long " * 600),
    }
    good = replace(first, id="good", images=[embedded])
    alike = replace(first, id="file", images=[pictures / "1.png"])
    requests = [*(replace(one, id=name) for name, one in wrong.items()), good, alike]
    for asking in (engine, with_options(engine, decode_workers=1)):
        answers = {one.id: one for one in asking.answer(requests)}
        assert all(name in answers[name].problem and not answers[name].text for name in wrong)
        assert answers["good"].problem is None and answers["good"].text == answers["file"].text
    assert finish(engine.stream(requests[0])).problem == answers["broken"].problem


class Large:
    """Items of more than a pipe holds."""

    def __len__(self):
        return 100

    def __getitem__(self, item):
        return np.zeros(1 << 20)


def decode_and_wait(pipe: int) -> None:
    results = iter(in_workers(Large(), workers=3))
    next(results)
    os.write(pipe, b"ready")
    signal.pause()


def test_decoders_die_with_a_killed_process():
    """They would hold its memory for ever: stuck at a pipe that nobody reads."""
    read, write = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=decode_and_wait, args=(write,))
    process.start()
    os.close(write)
    assert os.read(read, 5) == b"ready"
    process.kill()
    process.join()
    # To the end of the pipe, which every decoder holds open.
    assert select.select([read], [], [], 60)[0] and os.read(read, 1) == b""
    os.close(read)


def test_sampling_is_seeded(engine, pictures):
    hot = [replace(one, temperature=1.0, seed=3) for one in questions(pictures, 12)]
    first, second = texts(engine.answer(hot)), texts(engine.answer(hot))
    assert first == second != texts(engine.answer([replace(one, seed=4) for one in hot]))
    assert finish(engine.stream(hot[0])).text == finish(engine.stream(hot[0])).text


def test_an_aspect_ratio_replaces_the_checkpoints(engine, pictures):
    """`pad` shows the whole picture, `square` (ScienceQA's crop) its middle."""
    shown = {}
    for aspect in ("pad", "square"):
        config = with_options(engine, image_aspect_ratio=aspect).pixel_config
        shown[aspect] = decode(pictures / "0.png", engine.image_processor, config)
        assert shown[aspect].size == (90, 20)
    padded, cropped = (torch.from_numpy(shown[aspect].values).std(dim=2) for aspect in ("pad", "square"))
    assert padded[:, 0].max() < 1e-5 and padded[:, 28].min() > 0.1  # padding above, the picture in the middle
    assert cropped.min() > 0.1
    assert engine.pixel_config.image_aspect_ratio == "pad"  # the checkpoint's own


def test_the_context_bounds_an_answer(engine, pictures, monkeypatch):
    request = Request(text="What is it?", images=[pictures / "1.png"], max_new_tokens=50)
    tokens = finish(engine.stream(request)).visual_tokens[0]
    length = len(tokenizer_image_token(engine.prompt(request), engine.tokenizer)) - 1 + tokens
    config = engine.model.config
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(config, "max_position_embeddings", length + 5)
    assert finish(engine.stream(request)).timing.new_tokens == 5
    monkeypatch.setattr(config, "max_position_embeddings", length)
    assert f"{length} tokens long" in finish(engine.stream(request)).problem
    monkeypatch.setattr(config, "max_position_embeddings", 4096)
    monkeypatch.setattr(config, "tokenizer_model_max_length", length - 1)
    assert f"at most {length - 1}" in finish(engine.stream(request)).problem


# --- streams ---


def test_a_stream_is_the_answer(engine, pictures):
    requests = questions(pictures)[-8:]
    for request, whole in one_at_a_time(engine, requests).items():
        pieces: list[str] = []
        one = next(one for one in requests if one.id == request)
        answer = finish(engine.stream(one), pieces.append)
        assert isinstance(answer, Answer) and "".join(pieces) == answer.text == whole
        took = answer.timing
        assert 0 < took.new_tokens <= NEW and 0 < took.prefill_ms <= took.total_ms - took.vision_ms
        encoded = finish(engine.stream(replace(one, images=engine.encode(one.images))))
        assert encoded.text == whole and encoded.timing.vision_ms == 0


def test_a_closed_stream_stops_the_model(engine, monkeypatch):
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    steps = []
    hook = engine.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        pieces = engine.stream(Request(text="Hi", max_new_tokens=400))
        next(pieces)
        pieces.close()
    finally:
        hook.remove()
    assert 0 < len(steps) < 400


@pytest.mark.parametrize("stop", ["###", None])
def test_pieces_are_the_answer(engine, stop):
    """Byte by byte, with a stop string that is begun twice before it comes."""
    text = "  Ein Käse – 茶 # or ## no.  "
    tokenizer = engine.tokenizer
    ids = tokenizer(f"{text}{stop or ''}</s>", add_special_tokens=False).input_ids
    pieces: list[str] = []
    stream = TextStream(tokenizer, stop, pieces.append)
    stream.put(torch.empty(1, 0, dtype=torch.long))  # what generate calls the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
        assert "\ufffd" not in "".join(pieces)
        assert text.strip().startswith("".join(pieces))
    assert len(pieces) > 10
    stream.end()
    assert "".join(pieces) == stream.text == text.strip()


def test_an_answer_ends_at_the_stop_string(engine, monkeypatch):
    """A template whose turns end with text: what the model says after it is not asked for."""
    template = conv_templates["llava_v0"]
    asking = with_options(engine, "llava_v0")
    request = Request(text="Hi", max_new_tokens=12)
    for stop in dict.fromkeys(one_at_a_time(asking, [request], cut=False)[0]):  # another stop, another prompt
        changed = replace(template, sep=stop, messages=[])
        monkeypatch.setitem(engine_module.conv_templates, "llava_v0", changed)
        free = one_at_a_time(asking, [request], cut=False)[0]
        if stop in free[1:-1]:
            break
    pieces: list[str] = []
    answer = finish(asking.stream(request), pieces.append)
    (batched,) = asking.answer([request])
    assert stop in free and answer.timing.new_tokens < 12
    assert answer.text == "".join(pieces) == batched.text == free.split(stop)[0].strip()
