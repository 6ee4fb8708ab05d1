"""SEED-Bench, 14,233 questions about images and 5,009 about videos (their middle frame): multiple choice.

Right is the bare letter: `D.` and `b` are wrong, as upstream has it. Headline: accuracy over all; `image`
and `video` beside it.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from llava.eval.benchmarks import base
from llava.eval.questions import Sample, read_questions, with_labels
from llava.eval.reading import jsonl, read_json
from llava.files import write_text

FOLDER = "seed_bench"
QUESTIONS = f"{FOLDER}/llava-seed-bench.jsonl"
ANNOTATIONS = f"{FOLDER}/SEED-Bench.json"


class Annotation(msgspec.Struct):
    question_id: int | str
    answer: str
    data_type: str
    question_type_id: int | str


class Annotations(msgspec.Struct):
    questions: list[Annotation]
    question_type: dict[str, int | str]  # the number of each

    def __post_init__(self) -> None:
        if unknown := {one.question_type_id for one in self.questions} - set(self.question_type.values()):
            raise ValueError(f"the question types {unknown} are not in `question_type`")


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    annotated = root / ANNOTATIONS
    samples = read_questions(questions or root / QUESTIONS, root / FOLDER)
    labels = read_labels(annotated) if annotated.exists() else None
    return with_labels(samples, labels, annotated, whole=questions is None)


def read_labels(file: Path) -> list[Sample]:
    """Samples without text or image, in the order of the annotation file; the reference is the letter, image
    | video, and the question type."""
    table = read_json(file, Annotations)
    types = {number: name for name, number in table.question_type.items()}
    return [
        Sample(
            one.question_id,
            "",
            None,
            unit=str(one.question_id),
            where=str(file),
            reference=(one.answer, one.data_type, types[one.question_type_id]),
        )
        for one in table.questions
    ]


def judge(sample: Sample, answer: str) -> dict[str, float]:
    letter, data_type, question_type = sample.reference
    return base.tally(answer == letter, f"data/{data_type}", f"type/{question_type}")


def metrics(sums: base.Counts) -> dict:
    return {
        "accuracy": base.percent(sums),
        "image": base.percent(sums, "data/image"),
        "video": base.percent(sums, "data/video"),
        "by_type": base.percent_by(sums, "type"),
    }


def write(out: Path, root: Path | None, answers: Mapping[str, str]) -> None:
    """In the annotations' order, with the ids as they have them, where they are there."""
    ids = list(answers)
    if root and (root / ANNOTATIONS).exists():
        ids = [entry.question_id for entry in read_json(root / ANNOTATIONS, Annotations).questions]
    rows = [{"question_id": x, "prediction": answers[str(x)]} for x in ids if str(x) in answers]
    write_text(out, jsonl(rows))


SOURCE = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
BENCHMARK = base.Benchmark(
    name="seed",
    title="SEED-Bench",
    version="1, images and video frames",
    questions=19_242,
    headline="accuracy",
    files=(
        base.DataFile(QUESTIONS, 19_242, base.BUNDLE, "ask, score, submit"),
        base.DataFile(ANNOTATIONS, 19_242, SOURCE, "score"),
        base.DataFile(f"{FOLDER}/SEED-Bench-image", None, SOURCE, "ask"),
        base.DataFile(
            f"{FOLDER}/SEED-Bench-video-image", None, f"{SOURCE} (middle frame of each video)", "ask"
        ),
    ),
    load=load,
    measure=base.per_question(judge),
    metrics=metrics,
    unscored=f"{ANNOTATIONS} is missing; it holds the answers.",
    write=write,
    published=(58.6, 60.1, None, None, 61.6),
)
