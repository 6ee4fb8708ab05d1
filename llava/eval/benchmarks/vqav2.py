"""VQAv2, test-dev 2015: 107,394 questions, answered offline and scored by the EvalAI server (challenge 830).

    llava submit vqav2 --root playground/data/eval --answers answers/*.jsonl --out upload.json

The upload names every question of test2015 (447,793), with "" outside test-dev. Answers pass the M4C
normaliser on the way, as LLaVA's do. `llava score vqav2` needs an annotation file (val has one) and is the
official accuracy: references and answer are normalised only where the ten raw references differ, then
compared as strings. Published: LLaVA-1.5-7B 78.5.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llava.errors import UserError
from llava.eval.answers import Asked
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
from llava.eval.normalize import flatten, m4c, soft_score, vqa_official

FOLDER = "vqav2"
TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    file, images = questions or folder / TEST_DEV, folder / "test2015"
    found = sorted(folder.glob("v2_*_annotations.json"))
    if not found:
        return questions_of(file, images)
    if len(found) > 1:
        raise UserError(
            f"{folder}: {len(found)} annotation files ({', '.join(f.name for f in found)}); leave one."
        )
    annotations = {str(entry["question_id"]): entry for entry in read_json(found[0])["annotations"]}

    def reference(number: int, where: str) -> tuple[str, str, list[str]]:
        entry = annotations.get(str(number))
        if entry is None:
            raise UserError(
                f"{where}: question {number} is not in {found[0]}; the two are of different splits."
            )
        answers = [answer["answer"] for answer in entry["answers"]]
        if len(answers) != 10:
            raise UserError(f"{found[0]}: question {number} has {len(answers)} reference answers, not 10.")
        return entry["answer_type"], entry["question_type"], answers

    return questions_of(file, images, reference)


def questions_of(
    file: Path, images: Path, reference: Callable[[int, str], object] = lambda number, where: None
) -> list[Sample]:
    """The questions of a file; `reference`: of (id, file:line)."""
    return [
        Sample(
            row["question_id"],
            row["text"],
            images / row["image"],
            row["image"],
            where,
            reference=reference(row["question_id"], where),
        )
        for where, row in read_rows(file, "question_id", "image", "text")
    ]


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Official VQA accuracy of one answer against ten references, 0 to 1."""
    answer, references = flatten(answer), [flatten(reference) for reference in references]
    if len(set(references)) > 1:
        answer, *references = map(vqa_official, (answer, *references))
    return soft_score(references.count(answer))


def judge(sample: Sample, answer: str) -> Counts:
    answer_type, question_type, references = sample.reference
    right = accuracy(m4c(answer), references)
    counts = {"right": right, "n": 1.0}
    for name in (f"answer_type/{answer_type}", f"question_type/{question_type}"):
        counts |= {f"{name}/right": right, f"{name}/n": 1.0}
    return counts


def metrics(totals: Totals) -> dict:
    def rounded(value: np.ndarray) -> np.ndarray:
        return np.round(value, 6)  # the official tool rounds too (to two places)

    return {
        "accuracy": rounded(percent(totals["right"], totals["n"])),
        "per_answer_type": {x: rounded(y) for x, y in percent_by(totals, "answer_type").items()},
        "per_question_type": {x: rounded(y) for x, y in percent_by(totals, "question_type").items()},
    }


def outside(root: Path, samples: Sequence[Sample]) -> list[Asked]:
    return others_of(root / FOLDER / TEST, samples)


def others_of(listed: Path, samples: Sequence[Sample]) -> list[Asked]:
    """The questions of test2015 (340,000) that are not among `samples`; they may be answered."""
    known = {str(sample.id) for sample in samples}
    return [
        Asked(str(row["question_id"]), row["question_id"], row["text"], str(listed), required=False)
        for _, row in read_rows(listed, "question_id", "text")
        if str(row["question_id"]) not in known
    ]


def write(out: Path, root: Path, answers: Mapping[str, str]) -> None:
    write_upload(out, root / FOLDER / TEST, answers)


def write_upload(out: Path, questions: Path, answers: Mapping[str, str]) -> None:
    """One entry a question of `questions`, in its order; "" where there is no answer."""
    ids = [row["question_id"] for _, row in read_rows(questions, "question_id")]
    upload = [{"question_id": number, "answer": m4c(answers.get(str(number), ""))} for number in ids]
    write_text(out, json.dumps(upload))


BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2 test-dev",
    version="v2, test-dev2015",
    questions=107_394,
    headline="accuracy",
    files=(
        DataFile(f"{FOLDER}/{TEST_DEV}", 107_394, BUNDLE, "ask, score, submit"),
        DataFile(f"{FOLDER}/{TEST}", 447_793, BUNDLE, "submit"),
        DataFile(f"{FOLDER}/test2015", 81_434, "http://images.cocodataset.org/zips/test2015.zip", "ask"),
    ),
    load=load,
    measure=per_question(judge),
    metrics=metrics,
    unscored="test-dev has no public labels: `llava submit vqav2` writes what the server scores "
    "(val can be scored here: put its v2_*_annotations.json into vqav2/).",
    optional=outside,
    write=write,
)
