"""VQAv2, test-dev 2015: 107,394 questions, answered offline and scored by the EvalAI server (challenge 830).

    llava submit vqav2 --root playground/data/eval --answers answers/*.jsonl --out upload.json

The upload names every question of test2015 (447,793), with "" outside test-dev. Answers pass the M4C
normaliser on the way, as LLaVA's do. `llava score vqav2` needs an annotation file (val has one) and is the
official accuracy: references and answer are normalised only where the ten raw references differ.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from llava.errors import UserError
from llava.eval.benchmarks import base
from llava.eval.normalize import flatten, m4c, soft_score, vqa_official
from llava.eval.questions import Question, Sample, read_questions, with_labels
from llava.eval.reading import read_json, read_rows
from llava.files import write_text

FOLDER = "vqav2"
TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"


class Answer(msgspec.Struct):
    answer: str


class Annotation(msgspec.Struct):
    question_id: int | str
    answer_type: str
    question_type: str
    answers: Annotated[list[Answer], msgspec.Meta(min_length=10, max_length=10)]


class Annotations(msgspec.Struct):
    annotations: list[Annotation]


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    samples = read_questions(questions or folder / TEST_DEV, folder / "test2015")
    found = sorted(folder.glob("v2_*_annotations.json"))
    if not found:
        return samples
    if len(found) > 1:
        raise UserError(f"{folder}: several annotation files, {', '.join(x.name for x in found)}; leave one.")
    labels = []
    for one in read_json(found[0], Annotations).annotations:
        reference = one.answer_type, one.question_type, [answer.answer for answer in one.answers]
        labels.append(Sample(one.question_id, "", None, "", str(found[0]), reference=reference))
    return with_labels(samples, labels, found[0], whole=False)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Official VQA accuracy of one answer against ten references, 0 to 1."""
    answer, references = flatten(answer), [flatten(reference) for reference in references]
    if len(set(references)) > 1:
        answer, *references = map(vqa_official, (answer, *references))
    return soft_score(references.count(answer))


def judge(sample: Sample, answer: str) -> dict[str, float]:
    answer_type, question_type, references = sample.reference
    right = accuracy(m4c(answer), references)
    return base.tally(right, f"answer_type/{answer_type}", f"question_type/{question_type}")


def metrics(sums: base.Counts) -> dict:
    def rounded(value: np.ndarray) -> np.ndarray:
        return np.round(value, 6)  # the official tool rounds too (to two places)

    return {
        "accuracy": rounded(base.percent(sums)),
        "per_answer_type": {x: rounded(y) for x, y in base.percent_by(sums, "answer_type").items()},
        "per_question_type": {x: rounded(y) for x, y in base.percent_by(sums, "question_type").items()},
    }


def optional(root: Path, samples: Sequence[Sample], listed: Path | None = None) -> list[Sample]:
    """The questions of test2015 (340,000) that are not among `samples`."""
    known = {sample.key for sample in samples}
    rows = read_rows(listed or root / FOLDER / TEST, Question)
    others = (Sample(row.question_id, row.text, None, "", where) for where, row in rows)
    return [sample for sample in others if sample.key not in known]


def write(out: Path, root: Path, answers: Mapping[str, str], listed: Path | None = None) -> None:
    """One entry a question of test2015, in its order; "" where there is no answer."""
    ids = [row.question_id for _, row in read_rows(listed or root / FOLDER / TEST, Question)]
    upload = [{"question_id": x, "answer": m4c(answers.get(str(x), ""))} for x in ids]
    write_text(out, json.dumps(upload))


IMAGES = "http://images.cocodataset.org/zips/test2015.zip"
BENCHMARK = base.Benchmark(
    name="vqav2",
    title="VQAv2 test-dev",
    version="v2, test-dev2015",
    questions=107_394,
    headline="accuracy",
    files=(
        base.DataFile(f"{FOLDER}/{TEST_DEV}", 107_394, base.BUNDLE, "ask, score, submit"),
        base.DataFile(f"{FOLDER}/{TEST}", 447_793, base.BUNDLE, "submit"),
        base.DataFile(f"{FOLDER}/test2015", 81_434, IMAGES, "ask"),
    ),
    load=load,
    measure=base.per_question(judge),
    metrics=metrics,
    unscored="test-dev has no public labels: `llava submit vqav2` writes what the server scores "
    "(val can be scored here: put its v2_*_annotations.json into vqav2/).",
    optional=optional,
    write=write,
    published=(78.5, 79.1, 78.52, 40.73, 80.0, 72.0, 76.5, 72.8, 77.8),
)
