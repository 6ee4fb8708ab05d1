"""ScienceQA test, 4,241 questions, 2,017 of them with a picture; headline: accuracy on those (IMG).

Which questions have a picture is read from problems.json, never from the answers. The answer is one letter
A to E, or `A. ...`, or one sentence `The answer is A.`; everything else is wrong, as upstream's parser has
it. The published figures were made without padding (protocol `crop`); upstream's present code pads (protocol
`pad`, the default) and reaches 69.5 where LLaVA-1.5-7B has 66.8.
"""

import json
import re
from pathlib import Path
from typing import Annotated

import msgspec

from llava.errors import UserError
from llava.eval.benchmarks import base
from llava.eval.reading import read_json

FOLDER = "scienceqa"
QUESTIONS = "llava_test_CQM-A.json"
IMAGE_TAG = "<image>"


class Turn(msgspec.Struct):
    value: str


class Row(msgspec.Struct):
    id: int | str
    conversations: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    image: str | None = None


class Problem(msgspec.Struct):
    question: str
    choices: list[str]
    answer: int
    hint: str = ""
    image: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices) <= len(base.LETTERS):
            raise ValueError(f"the answer {self.answer} is none of {len(self.choices)} choices")


def load(root: Path, questions: Path | None = None) -> list[base.Sample]:
    folder = root / FOLDER
    return base.labelled_questions(
        questions or folder / QUESTIONS,
        folder / "images/test",
        read_labels(folder) if (folder / "problems.json").exists() else None,
        folder / "pid_splits.json",
        whole=questions is None,
        read=read_questions,
    )


def read_questions(file: Path) -> list[tuple[str, base.Question]]:
    """(file, row with the text the model is given) of a question file."""
    texts = [(x, x.conversations[0].value.replace(IMAGE_TAG, "").strip()) for x in read_json(file, list[Row])]
    return [(str(file), base.Question(row.id, row.image, text)) for row, text in texts]


def read_labels(folder: Path, split: str = "test") -> list[tuple[str, base.Question, Problem]]:
    """(file, row made of the problem, problem) of each question of a split, in its order."""
    file, splits_file = folder / "problems.json", folder / "pid_splits.json"
    problems = read_json(file, dict[str, Problem])
    splits = read_json(splits_file, dict[str, list[int | str]])
    if split not in splits:
        raise UserError(f"{splits_file}: there is no split {split!r}: {', '.join(splits)}.")
    labels = []
    for identifier in map(str, splits[split]):
        if identifier not in problems:
            raise UserError(f"{file}: question {identifier} of the {split} split is missing.")
        problem = problems[identifier]
        image = f"{identifier}/{problem.image}" if problem.image else None
        hint = f"Context: {problem.hint}\n" if problem.hint else ""
        options = "".join(f"\n{base.LETTERS[i]}. {choice}" for i, choice in enumerate(problem.choices))
        text = (hint + problem.question + options).strip()
        labels.append((str(file), base.Question(identifier, image, text), problem))
    return labels


def rebuild(root: Path) -> str:
    rows = []
    for _, row, problem in read_labels(root / FOLDER):
        asked = {"from": "human", "value": f"{IMAGE_TAG}\n{row.text}" if row.image else row.text}
        turns = [asked, {"from": "gpt", "value": base.LETTERS[problem.answer]}]
        rows.append({"id": row.question_id, "image": row.image, "conversations": turns})
    return json.dumps([{k: v for k, v in row.items() if v is not None} for row in rows], indent=2)


def read_answer(text: str) -> str | None:
    """The letter an answer names, or None."""
    if re.match(r"[A-E](\Z|\. )", text):
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


def judge(sample: base.Sample, answer: str) -> dict[str, float]:
    problem: Problem = sample.reference
    letter = read_answer(answer)
    right = letter is not None and base.LETTERS.index(letter) == problem.answer
    return base.tally(right, *(["image"] if problem.image is not None else []))


def metrics(sums: base.Counts) -> dict:
    return {
        "img_accuracy": base.percent(sums, "image"),
        "accuracy": base.percent(sums),
        **{"img_n": sums["image/n"], "img_right": sums["image/right"]},
        **{"n": sums["all/n"], "right": sums["all/right"]},
    }


SOURCE = "https://github.com/lupantech/ScienceQA, data/scienceqa"
BENCHMARK = base.Benchmark(
    name="scienceqa",
    title="ScienceQA test (IMG)",
    version="test split, CQM-A",
    questions=4_241,
    headline="img_accuracy",
    files=(
        base.DataFile(f"{FOLDER}/{QUESTIONS}", 4_241, base.BUNDLE, "ask", rebuild),
        base.DataFile(f"{FOLDER}/problems.json", 21_208, SOURCE, "score"),
        base.DataFile(f"{FOLDER}/pid_splits.json", None, SOURCE, "score"),
        base.DataFile(f"{FOLDER}/images/test", 2_017, SOURCE, "ask"),
    ),
    load=load,
    prompt=base.text_and_letter,
    recorded=lambda sample, asked: f"{IMAGE_TAG}\n{asked}" if sample.image else asked,
    measure=base.per_question(judge),
    metrics=metrics,
    unscored=f"{FOLDER}/problems.json and pid_splits.json are missing; they hold the answers.",
    protocols=(
        base.Protocol("pad", "images padded to a square as the checkpoint says (upstream since 2024-01-31)"),
        base.Protocol(
            "crop", "shorter edge resized, centre cropped (upstream before, and PruMerge's fork)", "square"
        ),
    ),
    max_new_tokens=1024,
    published=(66.8, 68.4, 69.51, 63.06, 71.6, 68.5, 68.3, 71.0, 71.0),
)
