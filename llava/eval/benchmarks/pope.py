"""POPE on COCO, 8,910 yes/no questions in three categories; headline: mean F1 (LLaVA-1.5-7B: 85.9).

The labels must be those of POPE commit e3e39262 (3000 adversarial, 3000 popular, 2910 random rows). Later
releases changed the rows, so every question is compared with its label's image and text before anything is
scored. Positive is yes; an answer is no if one of its words before the first period is exactly No, not or
no.
"""

from pathlib import Path

import numpy as np

from llava.errors import UserError
from llava.eval.benchmarks.base import (
    BUNDLE,
    SHORT,
    Benchmark,
    Counts,
    DataFile,
    Sample,
    Totals,
    bare_question,
    by_id_and_question,
    jsonl,
    per_question,
    question_key,
    ratio,
    read_rows,
)

FOLDER = "pope"
QUESTIONS = "llava_pope_test.jsonl"
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What LLaVA's question file adds to the label's id, in the file's order."""
WRONG_RELEASE = "The label files must be those of POPE commit e3e39262."


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    return from_files(
        questions or folder / QUESTIONS, folder / "coco", folder / "val2014", whole=questions is None
    )


def from_files(file: Path, label_folder: Path, images: Path, *, whole: bool = True) -> list[Sample]:
    """The questions of `file`, made from the labels where it is missing, with their labels if there are any.

    Raises UserError where a question and its label differ, or with `whole`, where a label has no question.
    """
    label_files = {category: label_folder / f"coco_pope_{category}.json" for category in OFFSETS}
    labels = read_labels(label_files) if all(path.exists() for path in label_files.values()) else {}
    rows = (
        list(read_rows(file, "question_id", "image", "text"))
        if file.exists() or not labels
        else made_rows(labels)
    )
    samples = []
    for where, row in rows:
        category = _category(row["question_id"], where)
        label_where, label = labels.get(row["question_id"], ("", None))
        question = bare_question(row["text"])
        if labels and (
            not label or (label["image"], bare_question(label["text"])) != (row["image"], question)
        ):
            found = (
                f"is {label['text']!r} about {label['image']} in {label_where}" if label else "has no label"
            )
            shown = f"question {row['question_id']}, {question!r} about {row['image']}"
            raise UserError(f"{where}: {shown}, {found}. {WRONG_RELEASE}")
        samples.append(
            Sample(
                row["question_id"],
                row["text"],
                images / row["image"],
                unit=row["image"],
                where=where,
                category=category,
                reference=label and label["label"],
                key=question_key(row["question_id"], question),
            )
        )
    asked = {sample.id for sample in samples}
    left = [where for number, (where, _) in labels.items() if number not in asked]
    if whole and left:
        raise UserError(f"{left[0]}: {len(left)} labels belong to no question of {file}. {WRONG_RELEASE}")
    return samples


def _category(identifier: int, where: str) -> str:
    for category, offset in OFFSETS.items():
        if isinstance(identifier, int) and offset < identifier < offset + 10_000_000:
            return category
    raise UserError(f"{where}: question_id {identifier!r} is of no POPE category.")


def read_labels(files: dict[str, Path]) -> dict[int, tuple[str, dict]]:
    """{id in the question file: (file:line, label row)}."""
    labels: dict[int, tuple[str, dict]] = {}
    for category, file in files.items():
        for where, row in read_rows(file, "question_id", "image", "text", "label"):
            key = OFFSETS[category] + row["question_id"]
            if key in labels:
                raise UserError(
                    f"{where}: id {row['question_id']} stands in {labels[key][0]} as well. {WRONG_RELEASE}"
                )
            labels[key] = (where, row)
    return labels


def made_rows(labels: dict[int, tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The question file, made from the labels."""
    return [
        (
            where,
            {
                "question_id": key,
                "image": label["image"],
                "text": label["text"] + SHORT,
                "category": _category(key, where),
            },
        )
        for key, (where, label) in labels.items()
    ]


def rebuild(root: Path) -> str:
    files = {category: root / FOLDER / "coco" / f"coco_pope_{category}.json" for category in OFFSETS}
    return jsonl(row for _, row in made_rows(read_labels(files)))


def read_answer(text: str) -> str:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def judge(sample: Sample, answer: str) -> Counts:
    positive, said = sample.reference != "no", read_answer(answer) == "yes"
    cell = ("T" if positive == said else "F") + ("P" if said else "N")
    return {f"{sample.category}/{cell}": 1.0, f"{sample.category}/n": 1.0}


def metrics(totals: Totals) -> dict:
    """Fractions per category; f1 is the mean over those that have answers, in percent.

    Where upstream divides by zero (no yes said, none right) precision, recall and F1 are 0.
    """
    by_category, f1 = {}, []
    for category in OFFSETS:
        tp, fp, tn, fn = (totals[f"{category}/{cell}"] for cell in ("TP", "FP", "TN", "FN"))
        precision, recall = ratio(tp, tp + fp, 0.0), ratio(tp, tp + fn, 0.0)
        n = totals[f"{category}/n"]
        by_category[category] = {
            "accuracy": ratio(tp + tn, n),
            "precision": precision,
            "recall": recall,
            "f1": np.where(n == 0, np.nan, ratio(2 * precision * recall, precision + recall, 0.0)),
            "yes_ratio": ratio(tp + fp, n),
            **{"n": n, "TP": tp, "FP": fp, "TN": tn, "FN": fn},
        }
        f1.append(by_category[category]["f1"])
    f1 = np.stack(np.broadcast_arrays(*f1))
    answered = np.isfinite(f1)
    return {"f1": 100 * ratio(np.where(answered, f1, 0).sum(0), answered.sum(0)), "by_category": by_category}


POPE = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    version="COCO, labels of commit e3e39262",
    questions=8_910,
    headline="f1",
    files=(
        DataFile(f"{FOLDER}/{QUESTIONS}", 8_910, f"the labels, or {BUNDLE}", "ask, score", rebuild=rebuild),
        DataFile(f"{FOLDER}/coco/coco_pope_adversarial.json", 3_000, POPE, "ask, score"),
        DataFile(f"{FOLDER}/coco/coco_pope_popular.json", 3_000, POPE, "ask, score"),
        DataFile(f"{FOLDER}/coco/coco_pope_random.json", 2_910, POPE, "ask, score"),
        DataFile(f"{FOLDER}/val2014", 40_504, "http://images.cocodataset.org/zips/val2014.zip", "ask"),
    ),
    load=load,
    measure=per_question(judge),
    metrics=metrics,
    unscored=f"the label files {FOLDER}/coco/coco_pope_{{adversarial,popular,random}}.json are missing.",
    find=by_id_and_question,
)
