"""POPE on COCO, 8,910 yes/no questions in three categories; headline: mean F1.

The labels must be those of POPE commit e3e39262 (3000 adversarial, 3000 popular, 2910 random rows). Later
releases changed the rows, so every question is compared with its label's image and text before anything is
scored. Positive is yes; an answer is no if one of its words before the first period is exactly No, not or
no.
"""

from pathlib import Path

import msgspec
import numpy as np

from llava.errors import UserError
from llava.eval.benchmarks import base
from llava.eval.reading import jsonl, read_rows

FOLDER = "pope"
QUESTIONS = "llava_pope_test.jsonl"
key = base.by_id_and_question
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What LLaVA's question file adds to the label's id, in the file's order."""


class Label(msgspec.Struct):
    question_id: int
    image: str
    text: str
    label: str
    category: str = ""


def load(root: Path, questions: Path | None = None) -> list[base.Sample]:
    folder = root / FOLDER
    file = questions or folder / QUESTIONS
    return from_files(file, folder / "coco", folder / "val2014", whole=questions is None)


def from_files(file: Path, label_folder: Path, images: Path, *, whole: bool = True) -> list[base.Sample]:
    labels = read_labels(label_folder) if all(x.exists() for x in label_files(label_folder)) else None
    samples = base.labelled_questions(
        file, images, labels, label_folder, whole=whole, key=base.by_id_and_question
    )
    for sample in samples:
        if sample.reference and sample.reference.image != sample.unit:
            label = f"{sample.reference.image} in {label_folder}"
            raise UserError(f"{sample.where}: {sample.label} is about {label}; {base.OTHER_RELEASE}.")
    return samples


def label_files(folder: Path) -> list[Path]:
    return [folder / f"coco_pope_{category}.json" for category in OFFSETS]


def read_labels(folder: Path) -> list[tuple[str, base.Question, Label]]:
    """(file:line, row of the question file, label) of each label."""
    labels = []
    for (category, offset), file in zip(OFFSETS.items(), label_files(folder), strict=True):
        for where, label in read_rows(file, Label):
            label.category = category
            row = base.Question(offset + label.question_id, label.image, label.text + base.SHORT, category)
            labels.append((where, row, label))
    return labels


def rebuild(root: Path) -> str:
    return jsonl(row for _, row, _ in read_labels(root / FOLDER / "coco"))


def read_answer(text: str) -> str:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def judge(sample: base.Sample, answer: str) -> dict[str, float]:
    category = sample.reference.category
    positive, said = sample.reference.label != "no", read_answer(answer) == "yes"
    cell = ("T" if positive == said else "F") + ("P" if said else "N")
    return {f"{category}/{cell}": 1.0, f"{category}/n": 1.0}


def metrics(sums: base.Counts) -> dict:
    """Fractions per category; f1 is the mean over those that have answers, in base.percent.

    Where upstream divides by zero (no yes said, none right) precision, recall and F1 are 0.
    """
    by_category, f1 = {}, []
    for category in OFFSETS:
        tp, fp, tn, fn = (sums[f"{category}/{cell}"] for cell in ("TP", "FP", "TN", "FN"))
        precision, recall = base.ratio(tp, tp + fp, 0.0), base.ratio(tp, tp + fn, 0.0)
        n = sums[f"{category}/n"]
        by_category[category] = {
            "accuracy": base.ratio(tp + tn, n),
            "precision": precision,
            "recall": recall,
            "f1": np.where(n == 0, np.nan, base.ratio(2 * precision * recall, precision + recall, 0.0)),
            "yes_ratio": base.ratio(tp + fp, n),
            **{"n": n, "TP": tp, "FP": fp, "TN": tn, "FN": fn},
        }
        f1.append(by_category[category]["f1"])
    f1 = np.stack(np.broadcast_arrays(*f1))
    answered = np.isfinite(f1)
    return {
        "f1": 100 * base.ratio(np.where(answered, f1, 0).sum(0), answered.sum(0)),
        "by_category": by_category,
    }


LABELS = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
BENCHMARK = base.Benchmark(
    name="pope",
    title="POPE",
    version="COCO, labels of commit e3e39262",
    questions=8_910,
    headline="f1",
    files=(
        base.DataFile(f"{FOLDER}/{QUESTIONS}", 8_910, f"the labels, or {base.BUNDLE}", "ask, score", rebuild),
        base.DataFile(f"{FOLDER}/coco/coco_pope_adversarial.json", 3_000, LABELS, "ask, score"),
        base.DataFile(f"{FOLDER}/coco/coco_pope_popular.json", 3_000, LABELS, "ask, score"),
        base.DataFile(f"{FOLDER}/coco/coco_pope_random.json", 2_910, LABELS, "ask, score"),
        base.DataFile(f"{FOLDER}/val2014", 40_504, "http://images.cocodataset.org/zips/val2014.zip", "ask"),
    ),
    load=load,
    measure=base.per_question(judge),
    metrics=metrics,
    unscored=f"the label files {FOLDER}/coco/coco_pope_{{adversarial,popular,random}}.json are missing.",
    key=base.by_id_and_question,
    published=(85.9, 86.4, 85.87, 47.21, 85.9, 76.3, 84.0, 78.5, 84.4),
)
