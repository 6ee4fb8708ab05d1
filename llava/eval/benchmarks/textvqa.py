"""TextVQA 0.5.1 val, 5,000 questions; soft accuracy on M4C-normalised answers.

Protocol `ocr` (the default, LLaVA's) hands the model the dataset's Rosetta OCR tokens in the prompt;
`no-ocr` leaves that line out and costs LLaVA-1.5 about 12 points: never compare the two. An answer is
joined by image id and question (ids repeat), whatever the frame of the stored prompt.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from llava.errors import UserError
from llava.eval.benchmarks import base
from llava.eval.normalize import m4c, soft_score
from llava.eval.questions import SHORT, Sample, by_id_and_question, labelled, read_questions
from llava.eval.reading import read_json

FOLDER = "textvqa"
QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "Reference OCR token:"


class Annotation(msgspec.Struct):
    question: str
    image_id: str
    answers: Annotated[list[str], msgspec.Meta(min_length=10, max_length=10)]


class Annotations(msgspec.Struct):
    data: list[Annotation]


def key(image_id: object, text: str) -> str:
    return by_id_and_question(image_id, text).lower()


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    file, annotated, images = questions or folder / QUESTIONS, folder / ANNOTATIONS, folder / "train_images"
    labels = read_labels(annotated, images) if annotated.exists() else None
    read = partial(read_questions, file, images, key)
    return labelled(file, read, labels, annotated, whole=questions is None)


def read_labels(file: Path, images: Path) -> list[Sample]:
    """The questions as the dataset has them: without OCR tokens."""
    return [
        Sample(
            one.image_id,
            one.question + SHORT,
            images / f"{one.image_id}.jpg",
            unit=f"{one.image_id}.jpg",
            where=str(file),
            reference=one.answers,
            key=key(one.image_id, one.question),
        )
        for one in read_json(file, Annotations).data
    ]


def prompt(sample: Sample, protocol: str = "ocr") -> str:
    if protocol == "ocr":
        if OCR not in sample.text:
            raise UserError(
                f"{QUESTIONS} is missing, and only it has the OCR tokens; --protocol no-ocr needs none."
            )
        return sample.text
    lines = sample.text.removesuffix(SHORT).split("\n")
    return "\n".join(line for line in lines if not line.startswith(OCR)) + SHORT


def judge(sample: Sample, answer: str) -> dict[str, float]:
    return base.tally(soft_score([m4c(reference) for reference in sample.reference].count(m4c(answer))))


SOURCE = "https://dl.fbaipublicfiles.com/textvqa"
BENCHMARK = base.Benchmark(
    name="textvqa",
    title="TextVQA val",
    version="0.5.1",
    questions=5_000,
    headline="accuracy",
    files=(
        base.DataFile(f"{FOLDER}/{QUESTIONS}", 5_000, base.BUNDLE, "ask, score"),
        base.DataFile(f"{FOLDER}/{ANNOTATIONS}", 5_000, f"{SOURCE}/data/TextVQA_0.5.1_val.json", "score"),
        base.DataFile(f"{FOLDER}/train_images", None, f"{SOURCE}/images/train_val_images.zip", "ask"),
    ),
    load=load,
    prompt=prompt,
    measure=base.per_question(judge),
    unscored=f"{FOLDER}/{ANNOTATIONS} is missing; it holds the reference answers.",
    key=key,
    protocols=(
        base.Protocol("ocr", "with the dataset's OCR tokens in the prompt, as LLaVA-1.5 and PruMerge report"),
        base.Protocol("no-ocr", "the question alone, as harnesses that report about 46 for LLaVA-1.5-7B"),
    ),
    published=(58.2, 58.2, 58.21, 41.43, 61.3, 56.0, 57.1, 58.4, 58.6),
)
