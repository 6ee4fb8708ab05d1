"""Bad input through the real command line: one sentence on stderr, exit status 2, nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_mm_utils import encoded
from tiny_checkpoints import Family

from llava import cli

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.fixture
def picture(tiny: Family) -> Path:
    path = tiny.root / "good.png"
    NOISE.save(path)
    return path


@pytest.fixture
def llava(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        return cli.main([str(part) for part in argv]), *capsys.readouterr()

    return run


def refused(result: tuple[int, str, str], command: str, *says: str) -> None:
    """Status 2, nothing on stdout, and one sentence on stderr that holds all of `says`."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    (sentence,) = err.splitlines()
    assert sentence.startswith(f"llava {command}: ") and all(part in sentence for part in says)


# Pictures


# What else a picture can have is told in test_mm_utils.py, whose sentences these commands print.
@pytest.mark.parametrize("content", [None, b"", encoded(NOISE, "JPEG")[:700], b"<html>404</html>"])
@pytest.mark.parametrize("command", ["chat", "show"])
def test_pictures(content, command, tiny, tmp_path, llava):
    path, out = tmp_path / "picture.img", tmp_path / "out" / "x.png"
    if content is not None:
        path.write_bytes(content)
    if command == "chat":
        result = llava("chat", "--model-path", tiny.full, "--image-file", path, "--query", "What?")
    else:
        result = llava("show", path, "--vision-tower", tiny.tower, "--out", out, "--device", "cpu")
    refused(result, command, str(path))
    assert not out.parent.exists()


# Reducers


@pytest.mark.parametrize("spec", ["prumege+", "topk(tokens=0)"])
@pytest.mark.parametrize("command", ["chat", "show"])
def test_reducer_specs(command, spec, tiny, picture, tmp_path, llava):
    out = tmp_path / "x.png"
    if command == "chat":
        result = llava("chat", "--model-path", tiny.full, "--query", "What?", "--reducer", spec)
    else:
        result = llava("show", picture, "--vision-tower", tiny.tower, "--out", out, "--reducer", spec)
    refused(result, command, spec.partition("(")[0])
    assert not out.exists()


def test_eval_leaves_no_answers_behind(tiny, root, tmp_path, llava):
    data = shutil.copytree(root / "tests/data/eval/playground/data/eval", tmp_path / "eval")
    (data / "pope/val2014").mkdir()
    for row in map(json.loads, (data / "pope/llava_pope_test.jsonl").read_text().splitlines()):
        Image.new("RGB", (8, 8)).save(data / "pope/val2014" / row["image"])
    answers = tmp_path / "answers.jsonl"
    flags = ["--model-path", tiny.full, "--root", data, "--answers", answers, "--device", "cpu"]
    refused(llava("eval", "pope", *flags, "--reducer", "prumege"), "eval", "did you mean")
    assert not list(tmp_path.glob("answers*"))


# Checkpoints


def test_no_such_checkpoint(tmp_path, llava):
    refused(llava("chat", "--model-path", tmp_path / "nowhere", "--query", "?"), "chat", "--model-path")
    refused(llava("chat", "--model-path", "someone/llava-9b", "--query", "?"), "chat", "someone/llava-9b")


def test_debug_shows_the_traceback(tiny, llava):
    flags = ["--model-path", tiny.full, "--image-file", "nowhere.png", "--query", "?"]
    status, out, err = llava("chat", *flags, "--debug")
    assert (status, out) == (2, "")
    assert err.startswith("Traceback") and "UserError: nowhere.png: no such image" in err
