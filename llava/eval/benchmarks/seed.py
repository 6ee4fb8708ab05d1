"""SEED-Bench, 14,233 questions about images and 5,009 about videos (their middle frame): multiple choice.

Right is the bare letter: `D.` and `b` are wrong, as upstream has it. Headline: accuracy over all, published
58.6 for LLaVA-1.5-7B; `image` and `video` beside it.
"""

from collections.abc import Mapping
from pathlib import Path

from llava.errors import UserError
from llava.eval.benchmarks.base import (
    BUNDLE,
    Benchmark,
    Counts,
    DataFile,
    Sample,
    Totals,
    jsonl,
    per_question,
    percent,
    percent_by,
    read_json,
    read_rows,
    write_text,
)

FOLDER = "seed_bench"
QUESTIONS = f"{FOLDER}/llava-seed-bench.jsonl"
ANNOTATIONS = f"{FOLDER}/SEED-Bench.json"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    file = questions or root / QUESTIONS
    rows = list(read_rows(file, "question_id", "image", "text"))
    references = read_references(root / ANNOTATIONS) if (root / ANNOTATIONS).exists() else None
    if references is not None:
        for where, row in rows:
            if str(row["question_id"]) not in references:
                raise UserError(f"{where}: question {row['question_id']} is not in {root / ANNOTATIONS}.")
        if questions is None and len(references) != len(rows):
            raise UserError(f"{root / ANNOTATIONS} has {len(references)} questions, {file} asks {len(rows)}.")
    return [
        Sample(
            row["question_id"],
            row["text"],
            root / FOLDER / row["image"],
            unit=row["image"],
            where=where,
            reference=references and references[str(row["question_id"])],
        )
        for where, row in rows
    ]


def read_references(file: Path) -> dict[str, tuple[str, str, str]]:
    """{id: (letter, image | video, question type)}, in the order of the annotation file."""
    table = read_json(file)
    types = {number: name for name, number in table["question_type"].items()}
    return {
        str(entry["question_id"]): (entry["answer"], entry["data_type"], types[entry["question_type_id"]])
        for entry in table["questions"]
    }


def judge(sample: Sample, answer: str) -> Counts:
    letter, data_type, question_type = sample.reference
    counts: Counts = {}
    for name in ("all/all", f"data/{data_type}", f"type/{question_type}"):
        counts |= {f"{name}/right": float(answer == letter), f"{name}/n": 1.0}
    return counts


def metrics(totals: Totals) -> dict:
    def accuracy(name: str) -> object:
        return percent(totals[f"{name}/right"], totals[f"{name}/n"])

    return {
        "accuracy": accuracy("all/all"),
        "image": accuracy("data/image"),
        "video": accuracy("data/video"),
        "by_type": percent_by(totals, "type"),
    }


def write(out: Path, root: Path | None, answers: Mapping[str, str]) -> None:
    """In the annotations' order, with the ids as they have them, where they are there."""
    annotations = root and root / ANNOTATIONS
    if annotations and annotations.exists():
        ids = [entry["question_id"] for entry in read_json(annotations)["questions"]]
    else:
        ids = list(answers)
    write_text(
        out, jsonl({"question_id": x, "prediction": answers[str(x)]} for x in ids if str(x) in answers)
    )


SEED = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
BENCHMARK = Benchmark(
    name="seed",
    title="SEED-Bench",
    version="1, images and video frames",
    questions=19_242,
    headline="accuracy",
    files=(
        DataFile(QUESTIONS, 19_242, BUNDLE, "ask, score, submit"),
        DataFile(ANNOTATIONS, 19_242, SEED, "score"),
        DataFile(f"{FOLDER}/SEED-Bench-image", None, SEED, "ask"),
        DataFile(f"{FOLDER}/SEED-Bench-video-image", None, f"{SEED} (middle frame of each video)", "ask"),
    ),
    load=load,
    measure=per_question(judge),
    metrics=metrics,
    unscored=f"{ANNOTATIONS} is missing; it holds the answers.",
    write=write,
)
