"""The evaluation loop: what the model is asked, what is written, resume after kills, and the commands.

The runner cases of expected.json (prompts, generation arguments, rows) are replayed with a scripted model;
the rest runs a tiny real checkpoint in float32 on the CPU.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava import cli
from llava.engine import ModelSource, Request
from llava.errors import UserError
from llava.eval import benchmarks, loop, run, run_llava
from llava.eval.provenance import Files
from llava.legacy import MODEL_VQA, MODEL_VQA_LOADER, MODEL_VQA_MMBENCH, MODEL_VQA_SCIENCE
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import prefix
from llava.reducers import build_reducer

RUNNERS = {one.name: one for one in (MODEL_VQA_LOADER, MODEL_VQA, MODEL_VQA_SCIENCE, MODEL_VQA_MMBENCH)}
FORK = multiprocessing.get_context("fork")
IMAGE = -200.0


# --- upstream's runners, replayed with a scripted model ---


class LetterTokenizer:
    """One id a character, so that a prompt can be read back."""

    eos_token, pad_token_id, chat_template = "</s>", 0, ""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return rows


@dataclass
class ScriptedModel:
    """Answers the prompt that upstream saw n-th with upstream's n-th output.

    An embedding is the id itself, an image's is IMAGE twice, so that keys and values tell the prompt.
    """

    outputs: dict[str, str]
    asked: list[str] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    config = SimpleNamespace(
        image_aspect_ratio=None,
        image_grid_pinpoints=None,
        mm_anyres_budget="tile",
        mm_use_im_start_end=False,
        tokenizer_model_max_length=None,
        max_position_embeddings=4096,
    )
    config._attn_implementation, config.mm_vision_tower = "sdpa", "clip"
    reducer, device, dtype = build_reducer("none"), torch.device("cpu"), torch.float32

    def get_input_embeddings(self):
        return lambda ids: ids.float()[:, None]

    def embed_images(self, pixels, sizes, reducers, texts):
        return [torch.full((2, 1), IMAGE) for _ in pixels]

    # In place of llava.model.prefix: the beginnings of prompts, and what comes after them.

    def begin(self, _, ids):
        return prefix.Prefix(((ids.float()[None], ids[None]),), torch.ones(1, len(ids), dtype=torch.bool))

    def extend(self, _, start, blocks, rows):
        assert set(rows) == {0}
        columns = max(map(len, blocks))
        said = torch.zeros(len(blocks), columns)
        for row, block in enumerate(blocks):
            said[row, columns - len(block) :] = block[:, 0]
        said = torch.cat([start.layers[0][0].expand(len(blocks), -1), said], dim=1)
        return prefix.Prefix(((said, said),), said != 0)

    def answer(self, _, beginnings, ids, rows, **arguments):
        said = [beginnings.layers[0][0][row][beginnings.mask[row]] for row in rows]
        prompts = [text(begin) + text(rest) for begin, rest in zip(said, ids, strict=True)]
        self.asked += prompts
        self.calls.append(arguments)
        return [self.outputs[prompt] for prompt in prompts]


def text(ids):
    return "".join(chr(int(one)) if one != IMAGE else "\0" for one in ids.tolist()).replace("\0\0", "<image>")


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
    monkeypatch.setattr(loop, "fingerprint", lambda path, base: "scripted")
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
    assert RUNNERS[case["module"]].eval_model(namespace) == 0

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
    args = MODEL_VQA_LOADER.parser().parse_args([*arguments, "--answers-file", str(answers)])
    assert MODEL_VQA_LOADER.eval_model(args) == 0  # without a model
    assert answers.read_text() == ""
    with pytest.raises(UserError, match="--chunk-idx 8"):
        run.chunk(range(13), 8, 8)


def test_chunks_are_upstreams():
    for path in (Path(__file__).parent / "data/eval/expected.json",):
        for total, chunks, index, span in json.loads(path.read_text())["chunking"]["rows"]:
            part = run.chunk(range(total), chunks, index)
            assert list(part) == (list(range(*span)) if isinstance(span, list) else [])


def test_all_rounds():
    """Options rotate one to the left a round; the letters' own order is stored beside them."""
    table = Path(__file__).parent / "data/eval/playground/data/eval/mmbench/mmbench_dev_20230712.tsv"
    args = MODEL_VQA_MMBENCH.parser().parse_args(["--question-file", str(table), "--all-rounds"])
    asked = [(text, line) for text, _, line in MODEL_VQA_MMBENCH.ask(args)]
    first = [(text, line) for text, line in asked if line["question_id"] == asked[0][1]["question_id"]]
    options = first[0][1]["options"]
    assert [line["round_id"] for _, line in first] == list(range(len(options)))
    text, line = first[1]
    assert line["options"] == options[1:] + options[:1] and line["option_char"] == ["B", "C", "D", "A"]
    assert text.endswith(f"\nA. {options[1]}\nB. {options[2]}\nC. {options[3]}\nD. {options[0]}")


# --- a run ---


@pytest.fixture
def data(golden, tmp_path):
    shutil.copytree(golden / "eval/playground/data/eval", tmp_path / "eval")
    for path in [tmp_path / "eval", *(tmp_path / "eval").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "eval"


def picture(path: Path, seed: int) -> Path:
    pixels = torch.randint(0, 256, (50, 70, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def test_broken_images_are_problems_and_asked_again(tiny, tmp_path):
    """Named in what the run took, never an empty answer; mended, the same run answers these and no other."""
    images = [picture(tmp_path / f"{n}.png", n) for n in range(6)]
    images[4] = tmp_path / "missing.png"
    images[5].write_bytes(images[5].read_bytes()[:200])
    requests = [
        Request(id=n, **run.with_image(f"{n}?", images[n % 6]), max_new_tokens=3, seed=0) for n in range(12)
    ]
    lines = [{"question_id": f"q{n}", "prompt": f"{n}?", "text": ""} for n in range(12)]
    source = ModelSource(str(tiny.full), device="cpu", reducer="prumerge")
    job = loop.Job(requests, lines, source, tmp_path / "a.jsonl", about={})
    took = loop.answer(job)
    problems = {one["question_id"]: one["problem"] for one in took["problems"]}
    assert set(problems) == {"q4", "q5", "q10", "q11"} and "missing.png" in problems["q4"]
    assert (took["questions"], took["answered"], took["images"]) == (12, 8, 4)
    assert 1 <= took["visual_tokens"]["mean"] <= 16
    before = job.answers.read_text()
    for number in (4, 5):
        picture(images[number], number)
    took = loop.answer(job)
    after = job.answers.read_text()
    assert after.startswith(before) and after.count("\n") == 12
    assert took["problems"] == [] and took["images"] == 6


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_whole_images_and_all_of_them(world):
    images = [(), ("a",), ("b",), ("a",), ("c", "a"), (), ("b",)]
    requests = [Request(id=n, images=one) for n, one in enumerate(images)]
    shares = [loop.share(requests, rank, world) for rank in range(world)]
    assert sorted(one.id for share in shares for one in share) == list(range(7))
    holders = [
        {rank for rank, share in enumerate(shares) for one in share if one.images == key}
        for key in images[1:5]
    ]
    assert all(len(ranks) == 1 for ranks in holders)


# --- the command ---


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
    session = facts["sessions"][0]
    assert session["torch"] == torch.__version__ and session["attention"] == "sdpa"
    assert session["device"].endswith(f", {os.cpu_count()} cores") and session["llava"]
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


def test_command_protocols(tiny, data, capsys):
    """What is asked is recorded; a part of a benchmark is scored as a part."""
    few = ["--decode-workers", "0", "--limit", "4"]
    assert cli.main(command(tiny, data, "textvqa", "--protocol", "no-ocr", *few)) == 0
    answers = data / "textvqa/answers/llava-tiny-no-ocr.jsonl"
    prompts = [json.loads(row)["prompt"] for row in answers.open()]
    assert len(prompts) == 4 and not any("OCR" in prompt for prompt in prompts)
    score = json.loads(answers.with_suffix(".provenance.json").read_text())["score"]
    assert score["partial"] is True and score["headline"]["over"] == 4
    for protocol, aspect in (("pad", "pad"), ("crop", "square")):
        answers = data / f"{protocol}.jsonl"
        argv = command(tiny, data, "scienceqa", "--protocol", protocol, "--answers", str(answers), *few)
        assert cli.main(argv) == 0
        facts = json.loads(answers.with_suffix(".provenance.json").read_text())
        assert facts["run"]["image_aspect_ratio"] == aspect
    assert cli.main(command(tiny, data, "pope", "--protocol", "ocr")) == 2
    assert "pope has no protocol 'ocr'" in capsys.readouterr().err


def texts_of(answers: Path) -> list[tuple[str, str]]:
    return sorted((row["prompt"], row["text"]) for row in map(json.loads, answers.open()))


@pytest.mark.slow
def test_kills_lose_nothing_and_double_nothing(tiny, data, tmp_path, capfd, monkeypatch):
    """SIGKILL in runs of one and of two processes; then a run that ends, with the answers of a whole one."""
    single = ["--workers", "1", "--answers", str(tmp_path / "whole.jsonl"), "--decode-workers", "0"]
    assert cli.main(command(tiny, data, "mme", *single)) == 0
    answers = tmp_path / "killed.jsonl"
    # One token of budget: question by question, so that there is time to kill.
    slow = ["--answers", str(answers), "--decode-workers", "1", "--batch-tokens", "1"]
    kills = 0
    for workers in ("1", "2"):
        argv = command(tiny, data, "mme", *slow, "--workers", workers)
        process = FORK.Process(target=cli.main, args=(argv,))
        process.start()
        before = lines_of(answers)
        while lines_of(answers) < before + 4 and process.is_alive():
            time.sleep(0.02)
        kills += process.is_alive()
        process.kill()
        process.join()
    with open(answers, "a") as file:
        file.write('{"question_id": "torn')
    monkeypatch.setattr(loop.multiprocessing, "get_context", lambda how: FORK)  # which imports nothing again
    assert cli.main(command(tiny, data, "mme", *slow[:4], "--workers", "2")) == 0
    assert kills == 2 and lines_of(answers) == 56 and Files(answers).parts == []
    assert texts_of(answers) == texts_of(tmp_path / "whole.jsonl")
    facts = json.loads(Files(answers).provenance.read_text())
    assert len(facts["sessions"]) >= 3 and facts["summary"]["answered"] == 56
    assert "56 of 56 questions answered" in capfd.readouterr().out


def lines_of(answers: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in [answers, *Files(answers).parts] if file.exists())


def test_processes_of_a_launcher(tiny, data, tmp_path, monkeypatch):
    """torchrun's environment: each takes its share, the first one sums up."""
    answers = tmp_path / "a.jsonl"
    argv = command(tiny, data, "mme", "--answers", str(answers), "--decode-workers", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(argv) == 0
        assert answers.exists() is (rank == "0")
    assert lines_of(answers) == 56
    assert cli.main([*argv, "--overwrite"]) == 2


def test_run_llava(tiny, tmp_path, capsys):
    images = [picture(tmp_path / f"{n}.png", n) for n in range(2)]
    args = SimpleNamespace(
        model_path=str(tiny.full), model_base=None, model_name="x", query="what is it?", temperature=0,
        conv_mode="vicuna_v1", image_file=str(images[1]), max_new_tokens=6, reducer="prumerge",
    )  # fmt: skip
    engine = ModelSource(str(tiny.full), conv_mode="vicuna_v1", device="cpu", reducer="prumerge").load()

    def plain(text, images):
        opened = [Image.open(image) for image in images]
        ids = tokenizer_image_token(
            engine.prompt(Request(text=text, images=images)), engine.tokenizer, return_tensors="pt"
        )
        pixels = process_images(opened, engine.image_processor, engine.model.config)
        new = engine.model.generate(ids[None], images=pixels, do_sample=False, max_new_tokens=6)
        return engine.tokenizer.decode(new[0], skip_special_tokens=True).strip()

    assert run_llava.eval_model(args) == 0
    assert capsys.readouterr().out.strip() == plain("<image>\nwhat is it?", images[1:])
    args.query, args.image_file = (
        "<image-placeholder> and <image-placeholder>?",
        f"{images[0]},{images[1]}",
    )
    assert run_llava.eval_model(args) == 0
    assert capsys.readouterr().out.strip() == plain("<image> and <image>?", images)
    args.query = "<image-placeholder>?"
    with pytest.raises(UserError, match="2 pictures"):
        run_llava.eval_model(args)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", [*RUNNERS, "run_llava"])
def test_old_names_are_programs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"llava.eval.{name}", run_name="__main__")
    assert left.value.code == 0 and "--model-path" in capsys.readouterr().out
