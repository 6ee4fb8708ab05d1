"""MM-Vet, 218 open questions graded by GPT-4 in the official notebook. Published: LLaVA-1.5-7B 31.1.

    llava submit mm-vet --answers answers.jsonl --out results.json   # for the notebook
    llava score mm-vet --answers grades.json                         # what the notebook gives back

Nothing here calls a judge. The grades file is {"v1_0": {"score": [0.5, ...], ...}, ...}, one score a
grading run; capabilities are read from mm-vet.json where it is there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.errors import UserError
from llava.eval.answers import Row
from llava.eval.benchmarks.base import (
    BUNDLE,
    Benchmark,
    Counts,
    DataFile,
    Sample,
    Totals,
    per_question,
    percent,
    percent_by,
    read_json,
    read_rows,
    write_text,
)

FOLDER = "mm-vet"
QUESTIONS = f"{FOLDER}/llava-mm-vet.jsonl"
CAPABILITIES = f"{FOLDER}/mm-vet.json"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    capabilities = read_json(root / CAPABILITIES) if (root / CAPABILITIES).exists() else {}
    return [
        Sample(
            row["question_id"],
            row["text"],
            root / FOLDER / "images" / row["image"],
            unit=row["image"],
            where=where,
            reference=tuple(capabilities.get(f"v1_{row['question_id']}", {}).get("capability", ())),
        )
        for where, row in read_rows(questions or root / QUESTIONS, "question_id", "image", "text")
    ]


def read_grades(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The grader's file as rows whose text is the mean score of the runs."""
    rows, problems = [], []
    for path in paths:
        try:
            grades = read_json(path)
        except UserError as error:
            raise UserError(
                f"{error} `llava score mm-vet` takes the grader's JSON, not the model's answers."
            ) from error
        for name, grade in grades.items():
            scores = grade.get("score") if isinstance(grade, dict) else grade
            scores = scores if isinstance(scores, list) else [scores]
            if scores and all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
                rows.append(
                    Row(f"{path}: {name}", name.removeprefix("v1_"), "", str(sum(scores) / len(scores)))
                )
            else:
                problems.append(f"{path}: {name} has no score between 0 and 1")
    return rows, problems


def judge(sample: Sample, grade: str) -> Counts:
    counts = {"right": float(grade), "n": 1.0}
    for capability in sample.reference:
        counts |= {f"capability/{capability}/right": float(grade), f"capability/{capability}/n": 1.0}
    return counts


def metrics(totals: Totals) -> dict:
    return {"total": percent(totals["right"], totals["n"]), "by_capability": percent_by(totals, "capability")}


def write(out: Path, root: Path | None, answers: Mapping[str, str]) -> None:
    write_text(out, json.dumps({f"v1_{identifier}": text for identifier, text in answers.items()}, indent=2))


BENCHMARK = Benchmark(
    name="mm-vet",
    title="MM-Vet",
    version="v1",
    questions=218,
    headline="total",
    files=(
        DataFile(QUESTIONS, 218, BUNDLE, "ask, score, submit"),
        DataFile(
            f"{FOLDER}/images",
            200,
            "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
            "ask",
        ),
        DataFile(
            CAPABILITIES, 218, "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip", "score"
        ),
    ),
    load=load,
    measure=per_question(judge),
    metrics=metrics,
    read=read_grades,
    write=write,
    max_new_tokens=1024,
)
