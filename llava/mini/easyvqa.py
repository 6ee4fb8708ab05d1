"""`llava mini easy-vqa`: a second world for `llava mini evaluate`, the data set easy-vqa (Victor Zhou, MIT).

Each picture, 64 x 64, shows one coloured shape on a pale ground; about ten questions a picture ask for the
shape, its colour, and what is there or is not. OUT gets the pictures, questions.jsonl and world.json. The
train split stays train; dev and test are the halves of its test split, drawn with a fixed seed.
"""

import argparse
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from llava.errors import UserError
from llava.eval.reading import jsonl, read_json
from llava.files import write_json, write_text
from llava.mini.questions import SHORT, Question
from llava.mini.world import SPLITS, constant_answers, question_rows

SHAPES = ("circle", "rectangle", "triangle")
NEGATED = re.compile(r"\bnot\b|^is no\b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder with train/ and test/ (default: the package's)")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--n", type=int, help="only the first so many pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    folder = (args.data or packaged()) / ("train" if args.split == "train" else "test")
    if not (folder / "questions.json").is_file():
        raise UserError(
            f"{folder} holds no questions.json: --data is the folder with easy-vqa's train/ and test/."
        )
    asked: dict[int, list[Question]] = {}
    for text, answer, image in read_json(folder / "questions.json", list[tuple[str, str, int]]):
        asked.setdefault(image, []).append(question(text, answer))
    drawn = np.random.default_rng(0).permutation(sorted(asked)).tolist()
    half = len(drawn) // 2
    images = {"train": drawn, "dev": drawn[:half], "test": drawn[half:]}[args.split][: args.n]
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for image in images:
        shutil.copy(folder / "images" / f"{image}.png", args.out / "images")
        rows += question_rows(asked[image], f"images/{image}.png", image)
    write_text(args.out / "questions.jsonl", jsonl(rows))
    about = {"world": "easy-vqa", "split": args.split, "n": len(images)}
    write_json(args.out / "world.json", about | {"constant_answers": constant_answers(rows)})
    print(f"{args.out}: {len(images)} pictures, {len(rows)} questions")
    return 0


def packaged() -> Path:
    """The data of the installed package, which is not imported."""
    if (package := find_spec("easy_vqa")) is None:
        raise UserError("the package easy-vqa is not installed: pip install easy-vqa, or name --data.")
    return Path(str(package.origin)).parent / "data"


def question(text: str, answer: str) -> Question:
    """Its words as they are, but for Yes and No, which the model begins with a capital letter.

    Types: shape and color (open); presence; absence, where Yes says that something is not there.
    """
    if answer in ("yes", "no"):
        kind = "absence" if NEGATED.search(text) else "presence"
        return Question(kind, "yesno", text + SHORT, answer.capitalize())
    return Question("shape" if answer in SHAPES else "color", "open", text + SHORT, answer)
