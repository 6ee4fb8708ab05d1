"""VizWiz test, 8,000 questions that blind people asked; scored by the EvalAI server (challenge 1911).

    llava submit vizwiz --root playground/data/eval --answers answers.jsonl --out upload.json

Answers pass the M4C normaliser, as LLaVA's do.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from llava.eval.benchmarks import base
from llava.eval.normalize import m4c
from llava.eval.questions import Sample, read_questions
from llava.files import write_text

QUESTIONS = "vizwiz/llava_test.jsonl"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    return read_questions(questions or root / QUESTIONS, root / "vizwiz/test")


def write(out: Path, root: Path, answers: Mapping[str, str], questions: Path | None = None) -> None:
    """One entry a question, in the order of the question file; "" where there is no answer."""
    samples = read_questions(questions or root / QUESTIONS)
    upload = [{"image": x.unit, "answer": m4c(answers.get(str(x.id), ""))} for x in samples]
    write_text(out, json.dumps(upload))


BENCHMARK = base.Benchmark(
    name="vizwiz",
    title="VizWiz test",
    version="test",
    questions=8_000,
    headline="accuracy",
    files=(
        base.DataFile(QUESTIONS, 8_000, base.BUNDLE, "ask, submit"),
        base.DataFile(
            "vizwiz/test", 8_000, "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", "ask"
        ),
    ),
    load=load,
    unscored="the test labels are not public: `llava submit vizwiz` writes what the server scores.",
    write=write,
    published=(50.0, 47.8, 50.06, 45.36, 53.6),
)
