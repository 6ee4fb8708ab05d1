"""LLaVA-Bench (In-the-Wild), 60 open questions on 24 images, judged by GPT-4 (gpt-4-0314) against its own
answers.

Nothing here calls the judge: `--answers` takes its reviews, JSON Lines with `question_id`, `category` and
`content` (first line: the reference's score and the model's) or `tuple`. Headline: 100 * mean score of the
model / mean score of the reference, one decimal, as published (65.4 for LLaVA-1.5-7B, the mean of three
judge runs). A review without two scores, which upstream counts as -1 and -1, is reported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UserError
from llava.eval.answers import Row, read_answers
from llava.eval.benchmarks.base import (
    Benchmark,
    Counts,
    DataFile,
    Sample,
    Totals,
    per_question,
    ratio,
    read_rows,
    require,
)

FOLDER = "llava-bench-in-the-wild"
QUESTIONS = f"{FOLDER}/questions.jsonl"
CATEGORIES = ("conv", "detail", "complex")


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    return [
        Sample(
            row["question_id"],
            row["text"],
            root / FOLDER / "images" / row["image"],
            unit=row["image"],
            where=where,
            category=row["category"],
            reference=f"llava_bench_{row['category']}",
        )
        for where, row in read_rows(
            require(questions or root / QUESTIONS), "question_id", "image", "text", "category"
        )
    ]


def parse_review(where: str, data: dict[str, Any]) -> Row:
    if "question_id" not in data or not ("content" in data or "tuple" in data):
        raise UserError(
            f"{where}: this is no review (question_id, content); the model's answers go to the judge first."
        )
    scores = data.get("tuple") or str(data["content"]).partition("\n")[0].replace(",", " ").split()
    try:
        reference, candidate = (float(score) for score in scores)
    except ValueError:
        reference = candidate = -1.0
    if min(reference, candidate) < 0:
        raise ValueError(f"the judge gave no two scores to question {data['question_id']}")
    return Row(where, str(data["question_id"]), str(data.get("category", "")), f"{reference} {candidate}")


def from_rows(rows: list[Row]) -> list[Sample]:
    """The questions as the reviews know them, each with its category, where questions.jsonl is missing."""
    seen = {row.id: Sample(row.id, "", None, row.id, row.where, reference=row.prompt) for row in rows}
    return list(seen.values())


def judge(sample: Sample, review: str) -> Counts:
    reference, candidate = (float(score) for score in review.split())
    counts: Counts = {}
    for name in ("all", sample.reference):
        counts |= {f"{name}/n": 1.0, f"{name}/reference": reference, f"{name}/candidate": candidate}
    return counts


def metrics(totals: Totals) -> dict:
    """Rounded where upstream's summary rounds: means to three places, the ratio to one."""

    def row(name: str) -> dict[str, np.ndarray]:
        reference = np.round(ratio(totals[f"{name}/reference"], totals[f"{name}/n"]), 3)
        candidate = np.round(ratio(totals[f"{name}/candidate"], totals[f"{name}/n"]), 3)
        return {
            "ratio": np.round(100 * ratio(candidate, reference), 1),
            "reference": np.round(10 * reference, 1),
            "candidate": np.round(10 * candidate, 1),
        }

    by_category = {name: row(f"llava_bench_{name}") for name in CATEGORIES}
    return {"all": row("all")["ratio"], "by_category": {"all": row("all"), **by_category}}


def read_reviews(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    return read_answers(paths, parse_review)


WILD = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
BENCHMARK = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench (In-the-Wild)",
    version="60 questions, reviews of gpt-4-0314",
    questions=60,
    headline="all",
    files=(
        DataFile(QUESTIONS, 60, WILD, "ask, score"),
        DataFile(f"{FOLDER}/images", 24, WILD, "ask"),
    ),
    load=load,
    measure=per_question(judge),
    metrics=metrics,
    read=read_reviews,
    from_rows=from_rows,
    max_new_tokens=1024,
)
