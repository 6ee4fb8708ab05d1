"""MM-Vet, 218 open questions graded by GPT-4 in the official notebook.

    llava submit mm-vet --answers answers.jsonl --out results.json   # for the notebook
    llava score mm-vet --answers grades.json                         # what the notebook gives back

Nothing here calls a judge. The grades file is {"v1_0": {"score": [0.5, ...], ...}, ...}, one score a
grading run; capabilities are read from mm-vet.json where it is there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from llava.errors import UserError
from llava.eval.answers import Row
from llava.eval.benchmarks import base
from llava.eval.questions import Sample, read_questions
from llava.eval.reading import read_json
from llava.files import write_text

FOLDER = "mm-vet"
QUESTIONS = f"{FOLDER}/llava-mm-vet.jsonl"
CAPABILITIES = f"{FOLDER}/mm-vet.json"


class Annotation(msgspec.Struct):
    capability: list[str]


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    """The reference of a question is the capabilities it asks for, () where they are not known."""
    file = root / CAPABILITIES
    known = read_json(file, dict[str, Annotation]) if file.exists() else {}
    capabilities = {name.removeprefix("v1_"): one.capability for name, one in known.items()}
    samples = read_questions(questions or root / QUESTIONS, root / FOLDER / "images")
    return [replace(sample, reference=capabilities.get(sample.key, ())) for sample in samples]


def read_grades(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The grader's file as rows whose text is the mean score of the runs."""
    rows, problems = [], []
    for path in paths:
        try:
            grades = read_json(path, dict[str, Any])
        except UserError as error:
            raise UserError(
                f"{error} `llava score mm-vet` takes the grader's JSON, not the model's answers."
            ) from error
        for name, grade in grades.items():
            scores = grade.get("score") if isinstance(grade, dict) else grade
            scores = scores if isinstance(scores, list) else [scores]
            if scores and all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
                mean = str(sum(scores) / len(scores))
                rows.append(Row(f"{path}: {name}", name.removeprefix("v1_"), "", mean))
            else:
                problems.append(f"{path}: {name} has no score between 0 and 1")
    return rows, problems


def judge(sample: Sample, grade: str) -> dict[str, float]:
    return base.tally(float(grade), *(f"capability/{name}" for name in sample.reference))


def metrics(sums: base.Counts) -> dict:
    return {"total": base.percent(sums), "by_capability": base.percent_by(sums, "capability")}


def write(out: Path, root: Path | None, answers: Mapping[str, str]) -> None:
    write_text(out, json.dumps({f"v1_{identifier}": text for identifier, text in answers.items()}, indent=2))


SOURCE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
BENCHMARK = base.Benchmark(
    name="mm-vet",
    title="MM-Vet",
    version="v1",
    questions=218,
    headline="total",
    files=(
        base.DataFile(QUESTIONS, 218, base.BUNDLE, "ask, score, submit"),
        base.DataFile(f"{FOLDER}/images", 200, SOURCE, "ask"),
        base.DataFile(CAPABILITIES, 218, SOURCE, "score"),
    ),
    load=load,
    measure=base.per_question(judge),
    metrics=metrics,
    read=read_grades,
    write=write,
    max_new_tokens=1024,
    published=(31.1, 30.2, 31.3, 11.3, 36.1),
)
