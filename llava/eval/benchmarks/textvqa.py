"""TextVQA 0.5.1 val, 5,000 questions; soft accuracy on M4C-normalised answers, published 58.2 for
LLaVA-1.5-7B.

Protocol `ocr` (the default, LLaVA's) hands the model the dataset's Rosetta OCR tokens in the prompt;
`no-ocr` leaves that line out and costs LLaVA-1.5 about 12 points: never compare the two. An answer is
joined by image id and question (ids repeat), whatever the frame of the stored prompt.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from llava.errors import UserError
from llava.eval.benchmarks.base import (
    BUNDLE,
    SHORT,
    Benchmark,
    Counts,
    DataFile,
    Protocol,
    Sample,
    Totals,
    bare_question,
    by_id_and_question,
    per_question,
    percent,
    question_key,
    read_json,
    read_rows,
)
from llava.eval.normalize import m4c, soft_score

FOLDER = "textvqa"
QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "Reference OCR token:"


def key(image_id: object, text: str) -> str:
    return question_key(image_id, bare_question(text).lower())


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    file, annotations = questions or folder / QUESTIONS, folder / ANNOTATIONS
    if not file.exists() and annotations.exists():
        return from_annotations(annotations, folder / "train_images")
    samples = [
        Sample(
            row["question_id"],
            row["text"],
            folder / "train_images" / row["image"],
            row["image"],
            where,
            key=key(row["question_id"], row["text"]),
        )
        for where, row in read_rows(file, "question_id", "image", "text")
    ]
    if not annotations.exists():
        return samples
    return _labelled(samples, from_annotations(annotations, folder), annotations, whole=questions is None)


def from_annotations(file: Path, images: Path) -> list[Sample]:
    """The questions as the dataset has them: without OCR tokens."""
    samples = []
    for entry in read_json(file)["data"]:
        if len(entry["answers"]) != 10:
            raise UserError(
                f"{file}: question {entry['question_id']} has {len(entry['answers'])} answers, not 10."
            )
        image = f"{entry['image_id']}.jpg"
        samples.append(
            Sample(
                entry["image_id"],
                entry["question"] + SHORT,
                images / image,
                unit=image,
                where=str(file),
                reference=entry["answers"],
                key=key(entry["image_id"], entry["question"]),
            )
        )
    return samples


def _labelled(samples: list[Sample], annotated: list[Sample], file: Path, whole: bool) -> list[Sample]:
    references: dict[str, list[list[str]]] = {}
    for sample in annotated:
        references.setdefault(sample.key, []).append(sample.reference)
    labelled = []
    for sample in samples:
        if not references.get(sample.key):
            raise UserError(
                f"{sample.where}: question {sample.asked.label} is not in {file}: two releases are mixed."
            )
        labelled.append(replace(sample, reference=references[sample.key].pop(0)))
    left = [name for name, answers in references.items() if answers]
    if whole and left:
        raise UserError(f"{file}: {len(left)} questions are not in {QUESTIONS}, the first is {left[0]!r}.")
    return labelled


def prompt(sample: Sample, protocol: str = "ocr") -> str:
    if protocol == "ocr":
        if OCR not in sample.text:
            raise UserError(
                f"{QUESTIONS} is missing, and only it has the OCR tokens; --protocol no-ocr needs none."
            )
        return sample.text
    lines = sample.text.removesuffix(SHORT).split("\n")
    return "\n".join(line for line in lines if not line.startswith(OCR)) + SHORT


def judge(sample: Sample, answer: str) -> Counts:
    return {
        "right": soft_score([m4c(reference) for reference in sample.reference].count(m4c(answer))),
        "n": 1.0,
    }


def metrics(totals: Totals) -> dict:
    return {"accuracy": percent(totals["right"], totals["n"])}


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA val",
    version="0.5.1",
    questions=5_000,
    headline="accuracy",
    files=(
        DataFile(f"{FOLDER}/{QUESTIONS}", 5_000, BUNDLE, "ask, score"),
        DataFile(
            f"{FOLDER}/{ANNOTATIONS}",
            5_000,
            "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
            "score",
        ),
        DataFile(
            f"{FOLDER}/train_images",
            None,
            "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            "ask",
        ),
    ),
    load=load,
    prompt=prompt,
    measure=per_question(judge),
    metrics=metrics,
    unscored=f"{FOLDER}/{ANNOTATIONS} is missing; it holds the reference answers.",
    find=partial(by_id_and_question, fold=str.lower),
    protocols=(
        Protocol("ocr", "with the dataset's OCR tokens in the prompt, as LLaVA-1.5 and PruMerge report"),
        Protocol("no-ocr", "the question alone, as harnesses that report about 46 for LLaVA-1.5-7B"),
    ),
)
