"""GQA testdev balanced, 12,578 questions; exact equality with the one reference, lower-cased, trailing
periods off.

Published: LLaVA-1.5-7B 62.0. `llava submit gqa` writes the predictions file of the official script.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from llava.errors import UserError
from llava.eval.benchmarks.base import (
    BUNDLE,
    SHORT,
    Benchmark,
    Counts,
    DataFile,
    Sample,
    Totals,
    jsonl,
    per_question,
    percent,
    read_json,
    read_rows,
    write_text,
)

QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "gqa/data/testdev_balanced_questions.json"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    annotations = read_json(root / ANNOTATIONS) if (root / ANNOTATIONS).exists() else {}
    file = questions or root / QUESTIONS
    if file.exists() or not annotations:
        rows = list(read_rows(file, "question_id", "image", "text"))
    else:
        rows = [(str(root / ANNOTATIONS), row) for row in made_rows(annotations)]
    if annotations:
        asked = {str(row["question_id"]): where for where, row in rows}
        for identifier, where in asked.items():
            if identifier not in annotations:
                raise UserError(f"{where}: question {identifier} is not in {root / ANNOTATIONS}.")
        left = [identifier for identifier in annotations if identifier not in asked]
        if left and questions is None:
            raise UserError(
                f"{root / ANNOTATIONS}: {len(left)} questions are not in {file}, the first: {left[0]}."
            )
    return [
        Sample(
            row["question_id"],
            row["text"],
            root / "gqa/data/images" / row["image"],
            unit=row["image"],
            where=where,
            reference=annotations[str(row["question_id"])]["answer"] if annotations else None,
        )
        for where, row in rows
    ]


def made_rows(annotations: dict[str, dict]) -> list[dict]:
    """The question file, made from the annotations."""
    return [
        {
            "question_id": identifier,
            "image": f"{entry['imageId']}.jpg",
            "text": entry["question"] + SHORT,
            "category": "default",
        }
        for identifier, entry in annotations.items()
    ]


def prediction(text: str) -> str:
    return text.rstrip(".").lower()


def judge(sample: Sample, answer: str) -> Counts:
    return {"right": float(prediction(answer) == sample.reference), "n": 1.0}


def metrics(totals: Totals) -> dict:
    return {"accuracy": percent(totals["right"], totals["n"])}


def write(out: Path, root: Path | None, answers: Mapping[str, str]) -> None:
    rows = [
        {"questionId": identifier, "prediction": prediction(text)} for identifier, text in answers.items()
    ]
    write_text(out, json.dumps(rows))


GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
BENCHMARK = Benchmark(
    name="gqa",
    title="GQA testdev",
    version="testdev balanced",
    questions=12_578,
    headline="accuracy",
    files=(
        DataFile(
            QUESTIONS,
            12_578,
            BUNDLE,
            "ask, score, submit",
            rebuild=lambda root: jsonl(made_rows(read_json(root / ANNOTATIONS))),
        ),
        DataFile(ANNOTATIONS, 12_578, GQA, "score"),
        DataFile("gqa/data/images", None, GQA, "ask"),
    ),
    load=load,
    measure=per_question(judge),
    metrics=metrics,
    unscored=f"{ANNOTATIONS} is missing; it holds the answers.",
    write=write,
)
