"""VizWiz test, 8,000 questions that blind people asked; scored by the EvalAI server (challenge 1911).

    llava submit vizwiz --root playground/data/eval --answers answers.jsonl --out upload.json

Answers pass the M4C normaliser, as LLaVA's do. Published: LLaVA-1.5-7B 50.0.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from llava.eval.benchmarks.base import BUNDLE, Benchmark, DataFile, Sample, read_rows, write_text
from llava.eval.normalize import m4c

QUESTIONS = "vizwiz/llava_test.jsonl"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    return questions_of(questions or root / QUESTIONS, root / "vizwiz/test")


def questions_of(file: Path, images: Path) -> list[Sample]:
    return [
        Sample(row["question_id"], row["text"], images / row["image"], row["image"], where)
        for where, row in read_rows(file, "question_id", "image", "text")
    ]


def write(out: Path, root: Path, answers: Mapping[str, str]) -> None:
    write_upload(out, root / QUESTIONS, answers)


def write_upload(out: Path, questions: Path, answers: Mapping[str, str]) -> None:
    """One entry a question of `questions`, in its order; "" where there is no answer."""
    rows = [row for _, row in read_rows(questions, "question_id", "image")]
    upload = [
        {"image": row["image"], "answer": m4c(answers.get(str(row["question_id"]), ""))} for row in rows
    ]
    write_text(out, json.dumps(upload))


BENCHMARK = Benchmark(
    name="vizwiz",
    title="VizWiz test",
    version="test",
    questions=8_000,
    headline="accuracy",
    files=(
        DataFile(QUESTIONS, 8_000, BUNDLE, "ask, submit"),
        DataFile("vizwiz/test", 8_000, "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", "ask"),
    ),
    load=load,
    unscored="the test labels are not public: `llava submit vizwiz` writes what the server scores.",
    write=write,
)
