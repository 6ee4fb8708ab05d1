"""GQA testdev balanced, 12,578 questions; exact equality with the one reference, lower-cased, trailing
periods off.

`llava submit gqa` writes the predictions file of the official script.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec

from llava.eval.benchmarks import base
from llava.eval.questions import SHORT, Sample, labelled, question_file, read_questions
from llava.eval.reading import read_json
from llava.files import write_text

QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "gqa/data/testdev_balanced_questions.json"
IMAGES = "gqa/data/images"


class Annotation(msgspec.Struct):
    question: str
    imageId: str
    answer: str


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    file, annotated = questions or root / QUESTIONS, root / ANNOTATIONS
    labels = read_labels(root) if annotated.exists() else None
    read = partial(read_questions, file, root / IMAGES)
    return labelled(file, read, labels, annotated, whole=questions is None)


def read_labels(root: Path) -> list[Sample]:
    """The questions, made from the annotations."""
    return [
        Sample(
            identifier,
            one.question + SHORT,
            root / IMAGES / f"{one.imageId}.jpg",
            unit=f"{one.imageId}.jpg",
            where=str(root / ANNOTATIONS),
            reference=one.answer,
        )
        for identifier, one in read_json(root / ANNOTATIONS, dict[str, Annotation]).items()
    ]


def rebuild(root: Path) -> str:
    return question_file(read_labels(root))


def prediction(text: str) -> str:
    return text.rstrip(".").lower()


def judge(sample: Sample, answer: str) -> dict[str, float]:
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
        base.DataFile(IMAGES, None, SOURCE, "ask"),
    ),
    load=load,
    measure=base.per_question(judge),
    unscored=f"{ANNOTATIONS} is missing; it holds the answers.",
    write=write,
    published=(62.0, 63.0, 61.94, 37.38, 63.3),
)
