"""easy-vqa as a world: a few hand-made files of its format become rows that the test bed reads."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.cli import main
from llava.mini import easyvqa
from llava.mini.comparison import kind_of
from llava.mini.evaluate import read_scenes

QUESTIONS = [
    ("what is the red shape?", "triangle", "shape", "triangle"),
    ("what color is the shape?", "red", "color", "red"),
    ("is there a teal shape?", "no", "presence", "No"),
    ("does the image contain a triangle?", "yes", "presence", "Yes"),
    ("does the image not contain a circle?", "yes", "other yes/no", "Yes"),
    ("is no red shape present?", "no", "other yes/no", "No"),
]
"""What is asked and answered, and the column and the answer it must get here."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 9)):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", (64, 64), (image, 0, 0)).save(tmp_path / f"data/{split}/images/{image}.png")
        rows = [(text, answer, image) for image in range(count) for text, answer, *_ in QUESTIONS]
        (tmp_path / "data" / split / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def read(data: Path, split: str, *more: str) -> list[dict]:
    out = data.parent / split
    assert main(["mini", "easy-vqa", "--data", str(data), "--split", split, "--out", str(out), *more]) == 0
    rows = [row for asked in read_scenes(out).values() for row in asked]
    for row in rows:  # the picture that the question is about, not another with its number
        with Image.open(out / row["image"]) as picture:
            assert picture.getpixel((0, 0)) == (row["question_id"] // 100, 0, 0)
    assert len({row["question_id"] for row in rows}) == len(rows)
    return rows


def test_questions_keep_their_words_and_get_their_column(data):
    rows = read(data, "train")
    assert len(rows) == 3 * len(QUESTIONS)
    expected = {text: (column, answer) for text, _, column, answer in QUESTIONS}
    for row in rows:
        text, prompt = row["text"].split("\n")
        assert (kind_of(row), row["answer"]) == expected[text] and prompt.startswith("Answer")


def test_dev_and_test_share_no_picture(data):
    dev, test = ({row["image"] for row in read(data, split)} for split in ("dev", "test"))
    assert not dev & test and len(dev | test) == 9 and abs(len(dev) - len(test)) == 1
    few = read(data, "test", "--n", "2")
    assert {row["image"] for row in few} < test and len(few) == 2 * len(QUESTIONS)


def test_a_missing_package_or_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(easyvqa, "find_spec", lambda name: None)
    command = ["mini", "easy-vqa", "--split", "dev", "--out", str(tmp_path / "out")]
    assert main(command) == 2 and "easy-vqa" in capsys.readouterr().err
    assert main([*command, "--data", str(tmp_path)]) == 2 and str(tmp_path) in capsys.readouterr().err
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "questions.json").write_text('[["what?", "circle"]]')
    assert main([*command, "--data", str(tmp_path)]) == 2 and "questions.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
