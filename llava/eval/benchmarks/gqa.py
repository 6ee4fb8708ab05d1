"""GQA testdev balanced, 12,578 questions; exact equality with the one reference, lower-cased, trailing
periods off.

`llava submit gqa` writes the predictions file of the official script.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from llava.eval.benchmarks import base
from llava.eval.reading import jsonl, read_json
from llava.files import write_text

QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "gqa/data/testdev_balanced_questions.json"


class Annotation(msgspec.Struct):
    question: str
    imageId: str
    answer: str


def load(root: Path, questions: Path | None = None) -> list[base.Sample]:
    annotated = root / ANNOTATIONS
    return base.labelled_questions(
        questions or root / QUESTIONS,
        root / "gqa/data/images",
        question_rows(annotated) if annotated.exists() else None,
        annotated,
        whole=questions is None,
    )


def question_rows(file: Path) -> list[tuple[str, base.Question, str]]:
    """(file, row of the question file, answer) of each annotation."""
    return [
        (str(file), base.Question(identifier, f"{one.imageId}.jpg", one.question + base.SHORT), one.answer)
        for identifier, one in read_json(file, dict[str, Annotation]).items()
    ]


def rebuild(root: Path) -> str:
    return jsonl(row for _, row, _ in question_rows(root / ANNOTATIONS))


def prediction(text: str) -> str:
    return text.rstrip(".").lower()


def judge(sample: base.Sample, answer: str) -> dict[str, float]:
    return base.tally(prediction(answer) == sample.reference)


def write(out: Path, root: Path | None, answers: Mapping[str, str]) -> None:
    rows = [{"questionId": x, "prediction": prediction(text)} for x, text in answers.items()]
    write_text(out, json.dumps(rows))


SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
BENCHMARK = base.Benchmark(
    name="gqa",
    title="GQA testdev",
    version="testdev balanced",
    questions=12_578,
    headline="accuracy",
    files=(
        base.DataFile(QUESTIONS, 12_578, base.BUNDLE, "ask, score, submit", rebuild),
        base.DataFile(ANNOTATIONS, 12_578, SOURCE, "score"),
        base.DataFile("gqa/data/images", None, SOURCE, "ask"),
    ),
    load=load,
    measure=base.per_question(judge),
    unscored=f"{ANNOTATIONS} is missing; it holds the answers.",
    write=write,
    published=(62.0, 63.0, 61.94, 37.38, 63.3),
)
