"""ScienceQA test, 4,241 questions, 2,017 of them with a picture; headline: accuracy on those (IMG).

Which questions have a picture is read from problems.json, never from the answers. The answer is one letter
A to E, or `A. ...`, or one sentence `The answer is A.`; everything else is wrong, as upstream's parser has
it. Published IMG: 66.8 for LLaVA-1.5-7B. That figure and PruMerge's were made without padding (protocol
`crop`); upstream's present code pads (protocol `pad`, the default) and reaches 69.5.
"""

import json
import re
from pathlib import Path

from llava.errors import UserError
from llava.eval.benchmarks.base import (
    BUNDLE,
    LETTER,
    LETTERS,
    Benchmark,
    Counts,
    DataFile,
    Protocol,
    Sample,
    Totals,
    per_question,
    percent,
    read_json,
)

FOLDER = "scienceqa"
QUESTIONS = "llava_test_CQM-A.json"
IMAGE_TAG = "<image>"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    problems, ids = read_problems(folder) if (folder / "problems.json").exists() else ({}, [])
    file = questions or folder / QUESTIONS
    rows = read_json(file) if file.exists() or not problems else made_rows(problems, ids)
    asked = {str(row["id"]) for row in rows}
    if problems and (stray := asked - set(ids)):
        raise UserError(
            f"{file}: question {min(stray)} is not in the test split of {folder / 'pid_splits.json'}."
        )
    if problems and questions is None and (left := set(ids) - asked):
        raise UserError(
            f"{file}: {len(left)} questions of the test split are not asked, the first: {min(left)}."
        )
    return samples_of(rows, problems, folder, file)


def read_problems(folder: Path, split: str = "test") -> tuple[dict[str, dict], list[str]]:
    """problems.json and the ids of a split."""
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if split not in splits:
        raise UserError(f"{folder / 'pid_splits.json'}: there is no split {split!r}: {', '.join(splits)}.")
    ids = [str(identifier) for identifier in splits[split]]
    for identifier in ids:
        if identifier not in problems:
            raise UserError(
                f"{folder / 'problems.json'}: question {identifier} of the {split} split is missing."
            )
    return problems, ids


def samples_of(rows: list[dict], problems: dict[str, dict], folder: Path, file: Path) -> list[Sample]:
    """Rows of the question file as samples; `problems` may be empty, then there are no references."""
    samples = []
    for row in rows:
        problem = problems.get(str(row["id"]))
        samples.append(
            Sample(
                row["id"],
                row["conversations"][0]["value"].replace(IMAGE_TAG, "").strip(),
                folder / "images" / "test" / row["image"] if "image" in row else None,
                unit=str(row["id"]),
                where=str(file),
                reference=problem
                and (problem["answer"], len(problem["choices"]), problem["image"] is not None),
            )
        )
    return samples


def made_rows(problems: dict[str, dict], ids: list[str]) -> list[dict]:
    """The question file, made from problems.json."""
    rows = []
    for identifier in ids:
        problem = problems[identifier]
        hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        options = "".join(f"\n{LETTERS[i]}. {choice}" for i, choice in enumerate(problem["choices"]))
        picture = {"image": f"{identifier}/{problem['image']}"} if problem["image"] else {}
        value = (f"{IMAGE_TAG}\n" if picture else "") + hint + problem["question"] + options
        says = [{"from": "human", "value": value}, {"from": "gpt", "value": LETTERS[problem["answer"]]}]
        rows.append({"id": identifier, **picture, "conversations": says})
    return rows


def rebuild(root: Path) -> str:
    return json.dumps(made_rows(*read_problems(root / FOLDER)), indent=2)


def prompt(sample: Sample, protocol: str = "pad") -> str:
    return sample.text + LETTER


def recorded(sample: Sample, asked: str) -> str:
    return f"{IMAGE_TAG}\n{asked}" if sample.image else asked


def read_answer(text: str) -> str | None:
    """The letter an answer names, or None."""
    if text in LETTERS[:5] and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS[:5] and text[1:3] == ". ":
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


def judge(sample: Sample, answer: str) -> Counts:
    answer_index, choices, with_image = sample.reference
    letter = read_answer(answer)
    right = float(
        letter is not None and letter in LETTERS[:choices] and LETTERS.index(letter) == answer_index
    )
    return {"n": 1.0, "right": right, "img_n": float(with_image), "img_right": right * with_image}


def metrics(totals: Totals) -> dict:
    return {
        "img_accuracy": percent(totals["img_right"], totals["img_n"]),
        "accuracy": percent(totals["right"], totals["n"]),
        **{name: totals[name] for name in ("img_n", "img_right", "n", "right")},
    }


SCIENCEQA = "https://github.com/lupantech/ScienceQA, data/scienceqa"
BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA test (IMG)",
    version="test split, CQM-A",
    questions=4_241,
    headline="img_accuracy",
    files=(
        DataFile(f"{FOLDER}/{QUESTIONS}", 4_241, BUNDLE, "ask", rebuild=rebuild),
        DataFile(f"{FOLDER}/problems.json", 21_208, SCIENCEQA, "score"),
        DataFile(f"{FOLDER}/pid_splits.json", None, SCIENCEQA, "score"),
        DataFile(f"{FOLDER}/images/test", 2_017, SCIENCEQA, "ask"),
    ),
    load=load,
    prompt=prompt,
    recorded=recorded,
    measure=per_question(judge),
    metrics=metrics,
    unscored=f"{FOLDER}/problems.json and pid_splits.json are missing; they hold the answers.",
    protocols=(
        Protocol("pad", "images padded to a square as the checkpoint says (upstream since 2024-01-31)"),
        Protocol(
            "crop", "shorter edge resized, centre cropped (upstream before, and PruMerge's fork)", "square"
        ),
    ),
    max_new_tokens=1024,
)
