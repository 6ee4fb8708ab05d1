"""MME, 2,374 yes/no questions, two an image, in 14 subtasks.

Per subtask: acc = right answers, acc+ = images with both right, score = 100 acc + 100 acc+. The headline is
Perception, the sum over ten subtasks (at most 2000); Cognition sums the other four (at most 800). An answer
is read as the official tool reads it, from its first four characters. Pairs are formed by image, not by
line. Published Perception: LLaVA-1.5-7B 1510.7.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava.errors import UserError
from llava.eval.answers import Row, numbered_lines
from llava.eval.benchmarks.base import (
    BUNDLE,
    SHORT,
    Benchmark,
    Counts,
    DataFile,
    Sample,
    Totals,
    Unit,
    bare_question,
    by_id_and_question,
    jsonl,
    question_key,
    ratio,
    read_rows,
    require,
)

RELEASE = "MME/MME_Benchmark_release_version"
QUESTIONS = "MME/llava_mme.jsonl"
ASK = "Please answer yes or no."
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    release = root / RELEASE
    labels = read_labels(release) if release.is_dir() else {}
    file = questions or root / QUESTIONS
    rows = (
        list(read_rows(file, "question_id", "image", "text"))
        if file.exists() or not labels
        else made_rows(root)
    )
    samples = []
    for where, row in rows:
        question = bare_question(row["text"])
        key = question_key(image_of(row["question_id"]), question)
        if labels and key not in labels:
            raise UserError(
                f"{where}: {row['question_id']} asks {question!r}, which {release} does not hold."
            )
        samples.append(
            Sample(
                row["question_id"],
                row["text"],
                release / row["image"],
                unit=row["image"],
                where=where,
                category=subtask_of(row["question_id"]),
                stratum=subtask_of(row["question_id"]),
                reference=labels.get(key),
                key=key,
            )
        )
    left = labels.keys() - {sample.key for sample in samples}
    if left and questions is None:
        raise UserError(f"{file}: {len(left)} questions of {release} are not asked, the first: {min(left)}.")
    return samples


def subtask_of(identifier: object) -> str:
    return str(identifier).partition("/")[0]


def image_of(identifier: object) -> str:
    """<subtask>/<name> of an image, wherever in the subtask's folder it lies and whatever it ends in."""
    name = str(identifier).rpartition("/")[2]
    return f"{subtask_of(identifier)}/{name.rpartition('.')[0] or name}"


def find(samples: Sequence[Sample]) -> Callable[[Row], str | None]:
    by_image = by_id_and_question([replace(sample, id=image_of(sample.id)) for sample in samples])
    return lambda row: by_image(replace(row, id=image_of(row.id)))


def read_labels(release: Path) -> dict[str, str]:
    """{"<subtask>/<stem> <question>": "yes" | "no"} of all txt files."""
    labels = {}
    for subtask in (*PERCEPTION, *COGNITION):
        for file in sorted(_texts(release / subtask)):
            for question, label in read_pair(file):
                labels[question_key(f"{subtask}/{file.stem}", question)] = label
    return labels


def _texts(folder: Path) -> list[Path]:
    inner = folder / "questions_answers_YN"
    return list((inner if inner.is_dir() else folder).glob("*.txt"))


def read_pair(file: Path) -> list[tuple[str, str]]:
    """The (question, yes | no) lines of one txt file."""
    pairs = []
    for number, line in numbered_lines(file):
        text, tab, label = line.strip().rpartition("\t")
        label = label.strip().lower()
        if not tab or label not in ("yes", "no"):
            raise UserError(f"{file}:{number}: `question<TAB>Yes|No` is expected, here is {line!r}.")
        pairs.append((" ".join(text.strip().removesuffix(ASK).split()), label))
    return pairs


def made_rows(root: Path, images_needed: bool = False) -> list[tuple[str, dict]]:
    """The question file, made from the txt files and the images beside them.

    Answers can be scored without the images, which only say whether a name ends in jpg or png.
    """
    release, rows = require(root / RELEASE), []
    for subtask in sorted((*PERCEPTION, *COGNITION)):
        folder = release / subtask
        images = folder / "images" if (folder / "images").is_dir() else folder
        names = {file.stem: file.name for file in sorted(images.glob("*")) if file.suffix != ".txt"}
        for file in sorted(_texts(folder)):
            if images_needed and file.stem not in names:
                raise UserError(f"{images}: no image for {file}.")
            name = names.get(file.stem, f"{file.stem}.jpg")
            image = f"{images.relative_to(release).as_posix()}/{name}"
            for question, _ in read_pair(file):
                row = {"question_id": image, "image": image, "text": question + SHORT, "category": subtask}
                rows.append((str(file), row))
    return rows


def rebuild(root: Path) -> str:
    return jsonl(row for _, row in made_rows(root, images_needed=True))


def read_answer(text: str) -> str:
    """yes, no or other, as the official tool reads it (from the first four characters)."""
    text = text.replace("\n", " ").replace("\t", " ").lower()
    if text in ("yes", "no"):
        return text
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def measure(unit: Unit) -> Counts:
    """The questions of one image. acc+ counts the image only where all of them are answered."""
    subtask = unit[0][0].category
    answered = [(sample.reference, read_answer(answer)) for sample, answer in unit if answer is not None]
    right = sum(label == answer for label, answer in answered)
    counts = {"n": len(answered), "right": right}
    if len(answered) == len(unit):
        counts |= {"images": 1, "both": right == len(unit)}
    counts["other"] = sum(answer == "other" for _, answer in answered)
    for name, label, read in (
        ("TP", "yes", "yes"),
        ("FN", "yes", "no"),
        ("TN", "no", "no"),
        ("FP", "no", "yes"),
    ):
        counts[name] = answered.count((label, read))
    return {f"{subtask}/{name}": float(value) for name, value in counts.items()}


def metrics(totals: Totals) -> dict:
    """Scores of the subtasks and their two sums, over the subtasks that are there."""
    subtasks = {}
    for subtask in (*PERCEPTION, *COGNITION):
        if np.any(totals[f"{subtask}/n"]):
            acc = 100 * ratio(totals[f"{subtask}/right"], totals[f"{subtask}/n"])
            acc_plus = 100 * ratio(totals[f"{subtask}/both"], totals[f"{subtask}/images"])
            counts = {name: totals[f"{subtask}/{name}"] for name in ("n", "other", "TP", "FN", "TN", "FP")}
            subtasks[subtask] = {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus, **counts}

    def total(group: tuple[str, ...]) -> object:
        scores = [subtasks[subtask]["score"] for subtask in group if subtask in subtasks]
        return sum(scores) if scores else np.nan

    return {"perception": total(PERCEPTION), "cognition": total(COGNITION), "subtasks": subtasks}


MME = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    version="MME_Benchmark_release_version, 14 subtasks",
    questions=2_374,
    headline="perception",
    files=(
        DataFile(QUESTIONS, 2_374, BUNDLE, "ask, score", rebuild=rebuild),
        DataFile(RELEASE, 1_187, MME, "ask, score"),
    ),
    load=load,
    measure=measure,
    metrics=metrics,
    unscored=f"{RELEASE} with its txt files is missing; they hold the labels.",
    find=find,
    unit="",
)
