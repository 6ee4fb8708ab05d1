"""POPE on COCO, 8,910 yes/no questions in three categories; headline: mean F1.

The labels must be those of POPE commit e3e39262 (3000 adversarial, 3000 popular, 2910 random rows). Later
releases changed the rows, so every question is compared with its label's image and text before anything is
scored. Positive is yes; an answer is no if one of its words before the first period is exactly No, not or
no.
"""

from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from llava.eval.benchmarks import base
from llava.eval.questions import SHORT, Sample, by_id_and_question, labelled, question_file, read_questions
from llava.eval.reading import read_rows

FOLDER = "pope"
QUESTIONS = "llava_pope_test.jsonl"
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What LLaVA's question file adds to the label's id, in the file's order."""
LABEL_FILES = {category: f"coco_pope_{category}.json" for category in OFFSETS}


class Label(msgspec.Struct):
    question_id: int
    image: str
    text: str
    label: str


def load(root: Path, questions: Path | None = None, label_folder: Path | None = None) -> list[Sample]:
    folder, images = label_folder or root / FOLDER / "coco", root / FOLDER / "val2014"
    file = questions or root / FOLDER / QUESTIONS
    found = all((folder / name).exists() for name in LABEL_FILES.values())
    labels = read_labels(folder, images) if found else None
    read = partial(read_questions, file, images, by_id_and_question)
    source = f"{folder} (must be that of POPE commit e3e39262)"
    whole = questions is None or label_folder is not None
    return labelled(file, read, labels, source, whole=whole, same_image=True)


def read_labels(folder: Path, images: Path) -> list[Sample]:
    """The questions, made from the labels."""
    samples = []
    for category, offset in OFFSETS.items():
        for where, label in read_rows(folder / LABEL_FILES[category], Label):
            number, image = offset + label.question_id, images / label.image
            key = by_id_and_question(number, label.text)
            text, unit = label.text + SHORT, label.image
            samples.append(Sample(number, text, image, unit, where, category, label.label, key=key))
    return samples


def rebuild(root: Path) -> str:
    return question_file(read_labels(root / FOLDER / "coco", root))


def read_answer(text: str) -> str:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def judge(sample: Sample, answer: str) -> dict[str, float]:
    positive, said = sample.reference != "no", read_answer(answer) == "yes"
    cell = ("T" if positive == said else "F") + ("P" if said else "N")
    return {f"{sample.category}/{cell}": 1.0, f"{sample.category}/n": 1.0}


def metrics(sums: base.Counts) -> dict:
    """Fractions per category; f1 is the mean over those that have answers, in base.percent.

    Where upstream divides by zero (no yes said, none right) precision, recall and F1 are 0.
    """
    by_category, scores = {}, []
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
        scores.append(by_category[category]["f1"])
    f1 = np.stack(np.broadcast_arrays(*scores))
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
    key=by_id_and_question,
    published=(85.9, 86.4, 85.87, 47.21, 85.9, 76.3, 84.0, 78.5, 84.4),
)
