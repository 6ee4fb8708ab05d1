"""The predict loop: what the model is asked, that batches and sharing change nothing, and what breaks how.

The runner cases of expected.json (prompts, generation arguments, rows) are replayed with a scripted model;
the rest runs a tiny real checkpoint in float32 on the CPU.
"""

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_checkpoints import HIDDEN, edit_json, family, single_safetensors

from llava import cli
from llava.errors import UserError
from llava.eval import (
    benchmarks,
    model_vqa,
    model_vqa_loader,
    model_vqa_mmbench,
    model_vqa_science,
    run,
    run_llava,
)
from llava.eval.benchmarks.base import Embedded
from llava.eval.predict import (
    Answerer,
    Generation,
    Request,
    batches,
    decode,
    predict,
    questions_of,
    short_uuid,
    summary,
)
from llava.eval.store import Store
from llava.mm_utils import load_image, process_images
from llava.model import prefix
from llava.model.builder import load_pretrained_model

SCRIPTS = {
    "model_vqa_loader": model_vqa_loader,
    "model_vqa": model_vqa,
    "model_vqa_science": model_vqa_science,
    "model_vqa_mmbench": model_vqa_mmbench,
}


# --- upstream's runners, replayed with a scripted model ---


class LetterTokenizer:
    """One id a character, so that a prompt can be read back."""

    eos_token, pad_token_id = "</s>", 0

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return rows


@dataclass
class ScriptedModel:
    """Answers the prompt that upstream saw n-th with upstream's n-th output."""

    outputs: dict[str, str]
    asked: list[str] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    config = SimpleNamespace(
        image_aspect_ratio=None,
        image_grid_pinpoints=None,
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        tokenizer_model_max_length=None,
    )
    config._attn_implementation, config.mm_vision_tower = "sdpa", "clip"
    reducer, device, dtype = SimpleNamespace(name="none", spec="none"), torch.device("cpu"), torch.float32

    def get_vision_tower(self):
        return SimpleNamespace(device=self.device, dtype=self.dtype)

    def encode_images(self, pixels):
        return [torch.zeros(2, 4) for _ in pixels]

    def project(self, visual_tokens):
        return visual_tokens

    # In place of llava.model.prefix: the beginnings of prompts, and what comes after them.

    def begin(self, _, ids):
        self.head = ids
        return prefix.Prefix((), torch.ones(1, len(ids), dtype=torch.bool))

    def extend(self, _, start, blocks, rows):
        assert (start.length, set(rows)) == (len(self.head), {0})
        return prefix.Prefix((), torch.ones(len(blocks), start.length + 2, dtype=torch.bool))

    def answer(self, _, beginnings, ids, rows, **arguments):
        assert max(rows) < beginnings.rows
        begin = {0: "", len(self.head): text(self.head), len(self.head) + 2: text(self.head) + "<image>"}
        prompts = [begin[beginnings.length] + text(row) for row in ids]
        self.asked += prompts
        self.calls.append(arguments)
        return [self.outputs[prompt] for prompt in prompts]


def text(ids):
    return "".join(map(chr, ids.tolist()))


class RecordingProcessor:
    image_mean = (0.5, 0.5, 0.5)

    def __init__(self):
        self.seen = []

    def preprocess(self, image, return_tensors):
        self.seen.append((image.mode, list(image.size)))
        return {"pixel_values": torch.zeros(1, 3, 4, 4)}


def runner_cases():
    golden = Path(__file__).resolve().parents[2] / "shared/golden/eval/expected.json"
    if not golden.exists():
        return [pytest.param(None, marks=pytest.mark.skip("no reference data at ../shared/golden"))]
    return [
        pytest.param(case, id=name)
        for name, case in json.loads(golden.read_text())["runner"]["cases"].items()
        if case["kind"] == "golden"
    ]


@pytest.mark.parametrize("case", runner_cases())
def test_runner_cases(case, golden, tmp_path, monkeypatch):
    root, upstream = golden / "eval/playground/data/eval", case["upstream"]
    outputs = dict(zip(upstream["model_inputs"], case["scripted_outputs"], strict=False))
    model, processor = ScriptedModel(outputs), RecordingProcessor()
    for name in ("begin", "extend", "answer"):
        monkeypatch.setattr(prefix, name, getattr(model, name))
    monkeypatch.setattr(run, "fingerprint", lambda path, base: "scripted")
    monkeypatch.setattr(
        "llava.model.builder.load_pretrained_model",
        lambda *a, **k: (LetterTokenizer(), model, processor, 2048),
    )
    arguments = dict(case["args"])
    for name in ("question_file", "image_folder"):
        if name in arguments:
            arguments[name] = str(root / arguments[name])
    answers = tmp_path / "answers.jsonl"
    namespace = argparse.Namespace(
        model_path="some/synth-7b",
        answers_file=str(answers),
        conv_mode="vicuna_v1",
        temperature=0,
        single_pred_prompt=True,
        decode_workers=0,
        **arguments,
    )
    assert SCRIPTS[case["module"]].eval_model(namespace) == 0

    assert sorted(model.asked) == sorted(upstream["model_inputs"])
    sizes = [size for _, size in upstream["images_as_seen"]]
    # each distinct image once, and always as RGB
    assert {tuple(size) for _, size in processor.seen} == {tuple(size) for size in sizes}
    assert {mode for mode, _ in processor.seen} == {"RGB"} and len(processor.seen) <= len(sizes)
    wanted = upstream["generate_kwargs"]
    for arguments in model.calls:
        assert arguments["do_sample"] is wanted["do_sample"] is False
        assert arguments["num_beams"] == wanted.get("num_beams", 1)
        assert (arguments["max_new_tokens"], arguments["use_cache"]) == (wanted["max_new_tokens"], True)
    rows = [json.loads(line) for line in answers.open()]
    assert all(len(row.pop("answer_id")) == 22 for row in rows)
    expected = upstream["answers_without_answer_id"]
    in_order = sorted(rows, key=lambda row: expected.index(row))
    assert in_order == expected
    assert [list(row) for row in in_order] == [list(row) for row in expected]  # the keys' order too


def test_surplus_chunk_is_empty(tmp_path, monkeypatch):
    """Upstream raises IndexError there."""
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        "".join(json.dumps({"question_id": n, "image": "x", "text": "?"}) + "\n" for n in range(13))
    )
    answers = tmp_path / "8_7.jsonl"
    arguments = ["--question-file", str(questions), "--num-chunks", "8", "--chunk-idx", "7"]
    args = model_vqa_loader.parser().parse_args([*arguments, "--answers-file", str(answers)])
    assert model_vqa_loader.eval_model(args) == 0  # without a model
    assert answers.read_text() == ""
    with pytest.raises(UserError, match="--chunk-idx 8"):
        run.chunk(range(13), 8, 8)


def test_chunks_are_upstreams():
    for path in (Path(__file__).parent / "data/eval/expected.json",):
        for total, chunks, index, span in json.loads(path.read_text())["chunking"]["rows"]:
            part = run.chunk(range(total), chunks, index)
            assert list(part) == (list(range(*span)) if isinstance(span, list) else [])


def test_all_rounds(tmp_path):
    """Options rotate one to the left a round; the letters' own order is stored beside them."""
    table = Path(__file__).parent / "data/eval/playground/data/eval/mmbench/mmbench_dev_20230712.tsv"
    requests = model_vqa_mmbench.requests_of(table, "", all_rounds=True)
    first = [request for request in requests if request.id == requests[0].id]
    options = first[0].after["options"]
    assert [request.before["round_id"] for request in first] == list(range(len(options)))
    assert first[1].after == {"options": options[1:] + options[:1], "option_char": ["B", "C", "D", "A"]}
    assert first[1].text.endswith(f"\nA. {options[1]}\nB. {options[2]}\nC. {options[3]}\nD. {options[0]}")


# --- a tiny real model ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return family(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def parts(tiny):
    tokenizer, model, image_processor, _ = load_pretrained_model(tiny.full, device="cpu", reducer="prumerge")
    return model, tokenizer, image_processor


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


def questions(pictures, count=40):
    """Questions of many lengths about eight pictures and about none."""
    requests = []
    for n in range(count):
        image = pictures / f"{n * 5 % 9}.png"
        text = f"{n}: " + "what is it " * (n * 7 % 5)
        requests.append(Request(n, text, image if image.exists() else None, recorded=text))
    return requests


def ask(parts, requests, folder, **options):
    """({id: answer}, store) of a run."""
    generation = options.pop("generation", Generation(max_new_tokens=6))
    workers = options.pop("decode_workers", 0)
    answerer = Answerer(*parts, options.pop("conv_mode", "vicuna_v1"), generation, **options)
    store = Store(folder / "a.jsonl", questions_of(requests), {})
    predict(requests, answerer, store, "m", decode_workers=workers, show_progress=False)
    answers = {row["question_id"]: row["text"] for row in map(json.loads, (folder / "a.jsonl").open())}
    return answers, store


def one_at_a_time(parts, requests, conv_mode="vicuna_v1"):
    """The slow way: image and question by themselves, through the pixels."""
    model, tokenizer, image_processor = parts
    answers = {}
    answerer = Answerer(*parts, conv_mode, Generation())
    for request in requests:
        ids = answerer.ids(request.text, request.image is not None)[None]
        given = {}
        if request.image:
            picture = load_image(request.image)
            given["images"] = process_images([picture], image_processor, model.config)
            given["image_sizes"] = [picture.size]
        new = model.generate(ids, **given, do_sample=False, max_new_tokens=6, pad_token_id=0)
        answers[request.id] = tokenizer.decode(new[0], skip_special_tokens=True).strip()
    return answers


def test_batches_answer_as_one_at_a_time(parts, pictures, tmp_path):
    requests = questions(pictures)
    slow = one_at_a_time(parts, requests)
    assert len(set(slow.values())) > 10  # the answers tell the questions apart
    for name, tokens, workers in (("one", 1, 0), ("few", 1200, 0), ("many", 100_000, 2)):
        answers, store = ask(parts, requests, tmp_path / name, batch_tokens=tokens, decode_workers=workers)
        assert answers == slow, name
        assert store.open_questions == 0
        store.close()


def test_every_image_is_encoded_once(parts, pictures, tmp_path, monkeypatch):
    requests = questions(pictures, 72)
    model = parts[0]
    encoded, encode = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    answers, store = ask(parts, requests, tmp_path)
    assert sum(encoded) == 8 and len(answers) == 72
    took = summary(store)
    assert took["images"] == 8 and took["answered"] == 72
    kept = [len(tokens) for tokens in encode(torch.rand(2, 3, 56, 56))]
    assert 1 <= took["visual_tokens"]["mean"] <= 16 and max(kept) <= 16
    store.close()


class WatchedStore(Store):
    """Counts the units that are in hand at a time."""

    held: set[int]
    most = 0

    def claims(self):
        for unit in super().claims():
            self.held.add(unit)
            self.most = max(self.most, len(self.held))
            yield unit

    def release(self, unit):
        super().release(unit)
        self.held.discard(unit)


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 1), (2, 4), (8, 4)])
def test_what_is_claimed_ahead_is_little(parts, pictures, tmp_path, processes, workers):
    """The unit in work and the next one, so that others find work to the end, however few units there are."""
    requests = [
        Request(n, f"{n}?", pictures / f"{n % 8}.png", recorded=f"{n}?") for n in range(72)
    ]  # nine questions a picture
    store = WatchedStore(tmp_path / "a.jsonl", questions_of(requests, processes), {})
    store.held = set()
    assert len(store.units) == {1: 2, 2: 8, 8: 8}[processes]
    answerer = Answerer(*parts, "vicuna_v1", Generation(max_new_tokens=2))
    predict(requests, answerer, store, "m", decode_workers=workers, show_progress=False)
    assert store.open_questions == 0 and not store.held
    assert store.most == 2
    store.close()


def test_every_beginning_is_computed_once(parts, pictures, tmp_path, monkeypatch):
    """The system prompt once a run, a picture once in all, a question its own words."""
    begun, seen, asked = [], [], []
    begin, extend, answer = prefix.begin, prefix.extend, prefix.answer

    def counting_extend(model, start, blocks, rows):
        seen.append(len(blocks))
        return extend(model, start, blocks, rows)

    def counting_answer(model, beginnings, ids, rows, **arguments):
        asked.extend(map(len, ids))
        return answer(model, beginnings, ids, rows, **arguments)

    monkeypatch.setattr(prefix, "begin", lambda model, ids: begun.append(len(ids)) or begin(model, ids))
    monkeypatch.setattr(prefix, "extend", counting_extend)
    monkeypatch.setattr(prefix, "answer", counting_answer)
    requests = questions(pictures, 72)
    answerer = Answerer(*parts, "vicuna_v1", Generation())
    ask(parts, requests, tmp_path)[1].close()
    assert begun == [len(answerer.head)] and sum(seen) - len(begun) == 8  # begin extends nothing by itself
    words = [answerer.ids(one.text, one.image is not None) for one in requests]
    images = sum(one.image is not None for one in requests)
    assert sum(asked) == sum(map(len, words)) - 72 * len(answerer.head) - images


@pytest.mark.parametrize("conv_mode", ["v1_mmtag", "llava_llama_2", "mpt"])
def test_templates_of_every_kind(parts, pictures, tmp_path, conv_mode):
    """With mmtag a prompt without image does not begin like one with an image."""
    requests = questions(pictures)
    answers, store = ask(parts, requests, tmp_path, conv_mode=conv_mode)
    store.close()
    slow = one_at_a_time(parts, requests, conv_mode)
    stop = Answerer(*parts, conv_mode, Generation()).stop
    assert answers == {n: (text.split(stop)[0].strip() if stop else text) for n, text in slow.items()}


def test_prompts_are_cut_as_one_at_a_time(parts, pictures, tmp_path):
    requests, model = questions(pictures), parts[0]
    free = one_at_a_time(parts, requests)
    longest = len(Answerer(*parts, "vicuna_v1", Generation()).ids("?", True)) + 10
    model.config.tokenizer_model_max_length = longest
    try:
        slow = one_at_a_time(parts, requests)
        answers, store = ask(parts, requests, tmp_path)
    finally:
        model.config.tokenizer_model_max_length = None
    store.close()
    assert answers == slow != free


def test_joined_tiles(tiny, pictures, tmp_path):
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
    tokenizer, model, image_processor, _ = load_pretrained_model(path, device="cpu")
    assert Answerer(model, tokenizer, image_processor, "vicuna_v1", Generation()).joins_tiles
    requests = questions(pictures, 20)
    slow = one_at_a_time((model, tokenizer, image_processor), requests)
    answers, store = ask((model, tokenizer, image_processor), requests, tmp_path)
    store.close()
    assert answers == slow and len(set(slow.values())) > 5


def every_cut(count):
    """All ways to cut so many rows into batches."""
    if count == 0:
        yield []
    for last in range(count):
        yield from ([*cut, slice(last, count)] for cut in every_cut(last))


@pytest.mark.parametrize("seed", range(30))
def test_batches_are_the_cheapest_that_fit(seed):
    """Against all cuts: fewest tokens with padding, where a batch costs as much as 32 tokens more."""
    draw = torch.Generator().manual_seed(seed)
    lengths = (10 + torch.randint(1 + 9 * seed, (9,), generator=draw)).tolist()
    lengths = sorted(lengths, reverse=True) if seed % 3 else lengths
    room = 150 + 40 * seed

    def cost(cut):
        batches = [lengths[part] for part in cut]
        if any(len(batch) > 1 and len(batch) * max(batch) > room for batch in batches):
            return None
        return sum(len(batch) * max(batch) + 32 for batch in batches)

    costs = [price for cut in every_cut(9) if (price := cost(cut)) is not None]
    assert cost(batches(lengths, lambda longest: room // longest)) == min(costs)


def test_batches_at_the_edges():
    assert batches([], lambda longest: 9) == []
    assert batches([9000, 8000], lambda longest: 0) == [slice(0, 1), slice(1, 2)]  # one in any case
    assert batches([400] * 30, lambda longest: 99) == [
        slice(0, 10),
        slice(10, 20),
        slice(20, 30),
    ]  # 4096 tokens
    assert batches([400, 40, 40], lambda longest: 99) == [slice(0, 1), slice(1, 3)]
    assert batches([40, 40, 30], lambda longest: 99) == [slice(0, 3)]  # 10 of padding or another pass


def test_keys_and_values_stay_within_the_budget(parts, pictures, tmp_path, monkeypatch):
    answer, sizes = prefix.answer, []

    def counting(model, beginnings, ids, rows, *, num_beams, **arguments):
        held = beginnings.rows * beginnings.length
        used = held + len(ids) * num_beams * (beginnings.length + max(map(len, ids)) + 6)
        assert used <= 2000 or len(ids) == 1
        sizes.append(len(ids))
        return answer(model, beginnings, ids, rows, num_beams=num_beams, **arguments)

    monkeypatch.setattr(prefix, "answer", counting)
    for beams in (1, 2):
        generation = Generation(max_new_tokens=6, num_beams=beams)
        folder = tmp_path / str(beams)
        ask(parts, questions(pictures, 60), folder, batch_tokens=2000, generation=generation)[1].close()
    assert sum(sizes) == 120 and max(sizes) > 3


def test_out_of_memory_halves_the_budget_and_goes_on(parts, pictures, tmp_path, monkeypatch):
    requests, model = questions(pictures), parts[0]
    whole, store = ask(parts, requests, tmp_path / "whole")
    store.close()
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

    def small_encode(pixels):
        at_most(2, len(pixels))
        return encode(pixels)

    monkeypatch.setattr(prefix, "answer", small_answer)
    monkeypatch.setattr(prefix, "extend", small_extend)
    monkeypatch.setattr(model, "encode_images", small_encode)
    answers, store = ask(parts, requests, tmp_path / "small")
    assert answers == whole
    assert 3 <= len(refused) < 14
    store.close()
    for step in ("answer", "extend"):
        monkeypatch.setattr(prefix, step, lambda *args, **arguments: at_most(0, 1))
        with pytest.raises(UserError, match="does not fit in memory"):
            ask(parts, requests, tmp_path / step)


def test_broken_images_are_problems_not_empty_answers(parts, pictures, tmp_path):
    requests = questions(pictures)
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes((pictures / "1.png").read_bytes()[:200])
    requests[4] = replace(requests[4], image=broken)
    requests[5] = replace(requests[5], image=missing)
    requests[6] = replace(requests[6], image=Embedded("no base64!"))
    requests[7] = replace(requests[7], text="what is <image>?")
    answers, store = ask(parts, requests, tmp_path / "run", decode_workers=1)
    assert set(answers) == set(range(40)) - {4, 5, 6, 7}
    problems = {one["question_id"]: one["problem"] for one in summary(store)["problems"]}
    assert set(problems) == {4, 5, 6, 7}
    assert "broken.png" in problems[4] and "no such image" in problems[5] and "<image>" in problems[7]
    store.close()
    # Mended, the same command answers these four and no other.
    shutil.copy(pictures / "1.png", broken)
    shutil.copy(pictures / "2.png", missing)
    text = io.BytesIO()
    Image.open(pictures / "5.png").save(text, "PNG")
    requests[6] = replace(requests[6], image=Embedded(base64.b64encode(text.getvalue()).decode()))
    requests[7] = replace(requests[7], text="what is it?")
    again, store = ask(parts, requests, tmp_path / "run")
    assert {n: again[n] for n in answers} == answers and set(again) == set(range(40))
    assert summary(store)["problems"] == []
    store.close()


def test_a_folder_without_images_is_a_mistake_of_the_command(parts, tmp_path):
    requests = [Request(n, "?", tmp_path / f"{n}.png", "?") for n in range(3)]
    with pytest.raises(UserError, match="none of the 3 images"):
        ask(parts, requests, tmp_path)


def test_a_run_goes_on_where_it_stopped(parts, pictures, tmp_path, monkeypatch):
    requests = questions(pictures)
    whole, store = ask(parts, requests, tmp_path / "whole")
    store.close()
    answer, calls = prefix.answer, []

    def interrupted(model, beginnings, ids, rows, **arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(ids))
        return answer(model, beginnings, ids, rows, **arguments)

    monkeypatch.setattr(prefix, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(parts, requests, tmp_path / "cut", batch_tokens=1500)
    monkeypatch.undo()
    lines = (tmp_path / "cut/a.jsonl").read_text().splitlines()
    assert 0 < len(lines) == sum(calls) < 40
    answers, store = ask(parts, requests, tmp_path / "cut", batch_tokens=1500)
    store.close()
    assert answers == whole
    assert (tmp_path / "cut/a.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert len((tmp_path / "cut/a.jsonl").read_text().splitlines()) == 40


ORPHANS = """
import signal
import numpy as np
from llava.eval.predict import in_workers

class Large:  # more than a pipe holds
    def __getitem__(self, item):
        return np.zeros(1 << 20)

results = iter(in_workers(Large(), range(100), workers=3, ahead=12))
next(results)
print("ready", flush=True)
signal.pause()
"""


def test_decoders_die_with_a_killed_process():
    """They would hold its memory for ever: stuck at a pipe that nobody reads."""
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate(timeout=60)  # to the end of the pipe, which every decoder holds open


def test_sampling_is_seeded_a_unit(parts, pictures, tmp_path):
    requests = questions(pictures)
    hot = Generation(max_new_tokens=6, temperature=1.0, seed=3)
    assert hot.arguments["do_sample"] is True
    runs = [ask(parts, requests, tmp_path / name, generation=hot) for name in ("a", "b")]
    other = ask(parts, requests, tmp_path / "c", generation=replace(hot, seed=4))
    for _, store in (*runs, other):
        store.close()
    assert runs[0][0] == runs[1][0] != other[0]


def test_protocols_see_other_pixels(parts, pictures):
    """`pad` shows the whole picture, `square` (ScienceQA's crop) its middle."""
    processor = parts[2]
    wide = pictures / "0.png"
    shown = {}
    for aspect in ("pad", "square"):
        recipe = Answerer(*parts, "vicuna_v1", Generation(), image_aspect_ratio=aspect).recipe
        shown[aspect] = decode(wide, processor, recipe)
        assert shown[aspect].size == (90, 20)
    padded, cropped = (torch.from_numpy(shown[aspect].values).std(dim=2) for aspect in ("pad", "square"))
    assert padded[:, 0].max() < 1e-5 and padded[:, 28].min() > 0.1  # padding above, the picture in the middle
    assert cropped.min() > 0.1
    assert (
        Answerer(*parts, "vicuna_v1", Generation()).recipe.image_aspect_ratio == "pad"
    )  # the checkpoint's own


def test_short_uuid():
    made = {short_uuid() for _ in range(100)}
    assert len(made) == 100 and all(len(one) == 22 and not set(one) & set("01IOl") for one in made)


# --- the command ---


@pytest.fixture
def data(golden, tmp_path):
    shutil.copytree(golden / "eval/playground/data/eval", tmp_path / "eval")
    for path in [tmp_path / "eval", *(tmp_path / "eval").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "eval"


def command(tiny, root, *more):
    return ["eval", *more, "--model-path", str(tiny.full), "--root", str(root), "--max-new-tokens", "3"]


def test_command_answers_scores_and_resumes(tiny, data, capsys):
    argv = command(tiny, data, "pope", "--reducer", "prumerge", "--decode-workers", "0")
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    answers = data / "pope/answers/llava-tiny-prumerge.jsonl"
    assert f"{answers}: 35 of 35 questions answered" in out and "POPE: f1 " in out
    before = answers.read_bytes()
    assert cli.main(argv) == 0 and answers.read_bytes() == before
    facts = json.loads(answers.with_suffix(".provenance.json").read_text())
    assert facts["run"]["reducer"] == "prumerge" and facts["run"]["benchmark"] == "pope"
    assert facts["score"]["headline"]["over"] == 35 and facts["summary"]["images"] == 2
    sitting = facts["sittings"][0]
    assert sitting["torch"] == torch.__version__ and sitting["attention"] == "sdpa"
    assert sitting["device"].endswith(f", {os.cpu_count()} cores") and sitting["llava"]
    # Another reducer, template or protocol never adds to this file.
    elsewhere = [*command(tiny, data, "pope"), "--answers", str(answers), "--conv-mode", "llava_v1"]
    assert cli.main(elsewhere) == 2
    message = capsys.readouterr().err
    assert "reducer: 'prumerge' there, 'none' now" in message and "conv_mode: 'vicuna_v1' there" in message
    assert answers.read_bytes() == before
    assert cli.main([*elsewhere, "--overwrite"]) == 0
    assert json.loads(answers.with_suffix(".provenance.json").read_text())["run"]["reducer"] == "none"


def test_command_without_data_says_what_belongs_where(data, tmp_path, capsys):
    """Before a model is looked for: every file of the benchmark, its rows, its source."""

    def ask_in(root):
        answers = ["--answers", str(tmp_path / "a.jsonl")]
        assert cli.main(["eval", "pope", "--model-path", "nowhere", "--root", str(root), *answers]) == 2
        return capsys.readouterr().err

    message = ask_in(tmp_path / "nothing")
    for file in benchmarks.get("pope").files:
        assert f"!! {file.path}  missing" in message and file.source in message
        assert f"{file.rows:,} rows; needed to ask" in message
    shutil.rmtree(data / "pope/val2014")
    message = ask_in(data)
    assert "!! pope/val2014  missing" in message and "none of the 2 images is there" in message
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("possible", [True, False])
def test_command_packed(tiny, data, caplog, monkeypatch, possible):
    """The same answers; where nothing can be packed one line says so, and the provenance too."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: possible)
    texts = {}
    for name, more in (("plain", []), ("packed", ["--packed"])):
        answers = data / f"{name}.jsonl"
        assert (
            cli.main(
                [*command(tiny, data, "pope", "--decode-workers", "0", *more), "--answers", str(answers)]
            )
            == 0
        )
        texts[name] = {row["question_id"]: row["text"] for row in map(json.loads, answers.open())}
    assert texts["plain"] == texts["packed"]
    assert ("packed weights have no effect here" in caplog.text) is not possible
    sitting = json.loads((data / "packed.provenance.json").read_text())["sittings"][0]
    assert sitting["packed"] is possible


def test_command_chunks_make_the_whole(tiny, data, capsys):
    folder = data / "vqav2/answers/llava-tiny"
    for index in range(8):  # 13 questions: chunk 7 is empty
        argv = command(tiny, data, "vqav2", "--num-chunks", "8", "--chunk-idx", str(index))
        assert cli.main([*argv, "--decode-workers", "0"]) == 0
    files = [folder / f"8_{index}.jsonl" for index in range(8)]
    assert files[7].read_text() == ""
    capsys.readouterr()
    assert cli.main(["score", "vqav2", "--root", str(data), "--answers", *map(str, files), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 13


def test_command_protocols(tiny, data, capsys):
    for protocol, line in (("ocr", True), ("no-ocr", False)):
        argv = command(tiny, data, "textvqa", "--protocol", protocol, "--limit", "4", "--decode-workers", "0")
        assert cli.main(argv) == 0
        name = "llava-tiny" if protocol == "ocr" else "llava-tiny-no-ocr"
        prompts = [json.loads(row)["prompt"] for row in (data / f"textvqa/answers/{name}.jsonl").open()]
        assert len(prompts) == 4 and all(("OCR" in prompt) is line for prompt in prompts)
    for protocol, aspect in (("pad", "pad"), ("crop", "square")):
        argv = command(
            tiny, data, "scienceqa", "--protocol", protocol, "--answers", str(data / f"{protocol}.jsonl")
        )
        assert cli.main([*argv, "--decode-workers", "0"]) == 0
        facts = json.loads((data / f"{protocol}.provenance.json").read_text())
        assert facts["run"]["image_aspect_ratio"] == aspect
    assert cli.main(command(tiny, data, "pope", "--protocol", "ocr")) == 2
    assert "pope has no protocol 'ocr'" in capsys.readouterr().err


@pytest.mark.slow
def test_command_several_processes(tiny, data, capfd):
    argv = command(
        tiny, data, "mme", "--workers", "2", "--answers", str(data / "a.jsonl"), "--decode-workers", "1"
    )
    assert cli.main(argv) == 0
    assert "56 of 56 questions answered" in capfd.readouterr().out
    single = command(
        tiny, data, "mme", "--workers", "1", "--answers", str(data / "b.jsonl"), "--decode-workers", "0"
    )
    assert cli.main(single) == 0
    both = [
        sorted((r["prompt"], r["text"]) for r in map(json.loads, (data / f"{n}.jsonl").open())) for n in "ab"
    ]
    assert both[0] == both[1]


def test_run_llava(tiny, pictures, parts, capsys):
    args = SimpleNamespace(
        model_path=str(tiny.full), model_base=None, model_name="x", query="what is it?", temperature=0,
        conv_mode="vicuna_v1", image_file=str(pictures / "1.png"), max_new_tokens=6, reducer="prumerge",
    )  # fmt: skip
    assert run_llava.eval_model(args) == 0
    request = Request(0, "what is it?", pictures / "1.png", "")
    assert capsys.readouterr().out.strip() == one_at_a_time(parts, [request])[0]
    args.query, args.image_file = (
        "<image-placeholder> and <image-placeholder>?",
        f"{pictures}/1.png,{pictures}/2.png",
    )
    assert run_llava.eval_model(args) == 0
    args.query = "<image-placeholder>?"
    with pytest.raises(UserError, match="1 places for pictures, and there are 2"):
        run_llava.eval_model(args)
