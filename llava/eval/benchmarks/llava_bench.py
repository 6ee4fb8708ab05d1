"""LLaVA-Bench (In-the-Wild), 60 open questions on 24 images, judged by GPT-4 (gpt-4-0314) against its own
answers.

Nothing here calls the judge: `--answers` takes its reviews, JSON Lines with `question_id`, `category` and
`content` (first line: the reference's score and the model's) or `tuple`. Headline: 100 * mean score of the
model / mean score of the reference, one decimal, as published (there the mean of three judge runs). A review
without two scores, which upstream counts as -1 and -1, is reported.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava.errors import UserError
from llava.eval.answers import Row, read_answers
from llava.eval.benchmarks import base
from llava.eval.questions import Question, Sample
from llava.eval.reading import read_rows

FOLDER = "llava-bench-in-the-wild"
QUESTIONS = f"{FOLDER}/questions.jsonl"


class OpenQuestion(Question, kw_only=True):
    category: Literal["conv", "detail", "complex"]


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    return [
        Sample(
            row.question_id,
            row.text,
            root / FOLDER / "images" / row.image,
            unit=row.image,
            where=where,
            reference=f"llava_bench_{row.category}",
        )
        for where, row in read_rows(questions or root / QUESTIONS, OpenQuestion)
    ]


def parse_review(where: str, data: dict[str, Any]) -> Row:
    if "question_id" not in data or not ("content" in data or "tuple" in data):
        raise UserError(
            f"{where}: this is no review (question_id, content); the model's answers go to the judge first."
        )
    scores = data.get("tuple") or str(data["content"]).partition("\n")[0].replace(",", " ").split()
    try:
        reference, candidate = (float(score) for score in scores)
    except (TypeError, ValueError):
        reference = candidate = -1.0
    if not (0 <= reference < math.inf and 0 <= candidate < math.inf):
        raise ValueError(f"the judge gave no two scores to question {data['question_id']}")
    return Row(where, str(data["question_id"]), str(data.get("category", "")), f"{reference} {candidate}")


def read_reviews(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    return read_answers(paths, parse_review)


def from_rows(rows: list[Row]) -> list[Sample]:
    """The questions as the reviews know them, each with its category, where questions.jsonl is missing."""
    seen = {row.id: Sample(row.id, "", None, row.id, row.where, reference=row.prompt) for row in rows}
    return list(seen.values())


def judge(sample: Sample, review: str) -> dict[str, float]:
    reference, candidate = (float(score) for score in review.split())
    counts: dict[str, float] = {}
    for name in ("all", sample.reference):
        counts |= {f"{name}/n": 1.0, f"{name}/reference": reference, f"{name}/candidate": candidate}
    return counts


def metrics(sums: base.Counts) -> dict:
    """Rounded where upstream's summary rounds: means to three places, the ratio to one."""

    def row(name: str) -> dict[str, np.ndarray]:
        reference = np.round(base.ratio(sums[f"{name}/reference"], sums[f"{name}/n"]), 3)
        candidate = np.round(base.ratio(sums[f"{name}/candidate"], sums[f"{name}/n"]), 3)
        return {
            "ratio": np.round(100 * base.ratio(candidate, reference), 1),
            "reference": np.round(10 * reference, 1),
            "candidate": np.round(10 * candidate, 1),
        }

    by_category = {name: row(f"llava_bench_{name}") for name in ("conv", "detail", "complex")}
    return {"all": row("all")["ratio"], "by_category": {"all": row("all"), **by_category}}


SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
BENCHMARK = base.Benchmark(
    name="llava-bench",
    title="LLaVA-Bench (In-the-Wild)",
    version="60 questions, reviews of gpt-4-0314",
    questions=60,
    headline="all",
    files=(
        base.DataFile(QUESTIONS, 60, SOURCE, "ask, score"),
        base.DataFile(f"{FOLDER}/images", 24, SOURCE, "ask"),
    ),
    load=load,
    measure=base.per_question(judge),
    metrics=metrics,
    read=read_reviews,
    from_rows=from_rows,
    max_new_tokens=1024,
    published=(65.4, 67.9, None, None, 72.5),
)
