"""MME, 2,374 yes/no questions, two an image, in 14 subtasks.

Per subtask: acc = right answers, acc+ = images with both right, score = 100 acc + 100 acc+. Headline:
Perception, the sum of ten subtasks (at most 2000); Cognition sums the other four (at most 800).
"""

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from llava.errors import UserError
from llava.eval.answers import numbered_lines
from llava.eval.benchmarks import base
from llava.eval.questions import SHORT, Sample, by_id_and_question, labelled, question_file, read_questions
from llava.eval.reading import require

RELEASE = "MME/MME_Benchmark_release_version"
QUESTIONS = "MME/llava_mme.jsonl"
ASK = "Please answer yes or no."
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    file, release = questions or root / QUESTIONS, root / RELEASE
    labels = read_labels(release) if release.is_dir() else None
    return labelled(file, lambda: read_questions(file, release, key), labels, release, whole=not questions)


def key(identifier: object, text: str) -> str:
    """Subtask, name of the image (wherever it lies there and whatever it ends in), question."""
    path = PurePosixPath(str(identifier))
    return by_id_and_question(f"{path.parts[0] if path.parts else ''}/{path.stem}", text)


def read_labels(release: Path) -> list[Sample]:
    """The questions, made from the txt files; an image that is not there is taken to be a jpg."""
    samples = []
    for subtask in sorted((*PERCEPTION, *COGNITION)):
        folder = release / subtask  # images and txt files lie in it side by side, or in two folders
        images = {file.stem: file for file in folder.rglob("*") if file.suffix != ".txt"}
        for file in sorted(folder.rglob("*.txt")):
            image = images.get(file.stem, folder / f"{file.stem}.jpg")
            name = image.relative_to(release).as_posix()
            for number, line in numbered_lines(file):
                text, _, label = map(str.strip, line.rpartition("\t"))
                if label.lower() not in ("yes", "no"):
                    raise UserError(f"{file}:{number}: `question<TAB>Yes|No` is expected, here is {line!r}.")
                text = " ".join(text.removesuffix(ASK).split()) + SHORT
                where, label = f"{file}:{number}", label.lower()
                samples.append(Sample(name, text, image, name, where, subtask, label, key=key(name, text)))
    return samples


def rebuild(root: Path) -> str:
    samples = read_labels(require(root / RELEASE))
    for sample in samples:
        require(root / RELEASE / sample.unit)  # without it nobody knows whether its name ends in jpg or png
    return question_file(samples)


def read_answer(text: str) -> str:
    """yes, no or other, as the official tool reads it (from the first four characters)."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def measure(unit: base.Unit) -> dict[str, float]:
    """The questions of one image. acc+ counts the image only where all of them are answered."""
    counts: Counter[str] = Counter()
    for sample, answer in unit:
        if answer is not None:
            said = read_answer(answer)
            right = said == sample.reference
            cell = ("T" if right else "F") + ("P" if said == "yes" else "N")
            counts.update({"n": 1, "right": right, "other" if said == "other" else cell: 1})
    counts.update(images=counts["n"] == len(unit), both=counts["right"] == len(unit))
    return {f"{unit[0][0].category}/{name}": float(count) for name, count in counts.items()}


def metrics(sums: base.Counts) -> dict:
    """Scores of the subtasks and their two sums, over the subtasks that are there."""
    subtasks = {}
    for subtask in (*PERCEPTION, *COGNITION):
        if np.any(sums[f"{subtask}/n"]):
            acc = 100 * base.ratio(sums[f"{subtask}/right"], sums[f"{subtask}/n"])
            acc_plus = 100 * base.ratio(sums[f"{subtask}/both"], sums[f"{subtask}/images"])
            counts = {name: sums[f"{subtask}/{name}"] for name in ("n", "other", "TP", "FN", "TN", "FP")}
            subtasks[subtask] = {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus, **counts}
    totals = {}
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scores = [subtasks[subtask]["score"] for subtask in group if subtask in subtasks]
        totals[name] = sum(scores) if scores else np.nan
    return {**totals, "subtasks": subtasks}


SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
BENCHMARK = base.Benchmark(
    name="mme",
    title="MME",
    version="MME_Benchmark_release_version, 14 subtasks",
    questions=2_374,
    headline="perception",
    files=(
        base.DataFile(QUESTIONS, 2_374, base.BUNDLE, "ask, score", rebuild),
        base.DataFile(RELEASE, 1_187, SOURCE, "ask, score"),
    ),
    load=load,
    measure=measure,
    metrics=metrics,
    unscored=f"{RELEASE} with its txt files is missing; they hold the labels.",
    key=key,
    within_category=True,
    unit="",
    published=(1510.7, 1476.9, 1506.5, 719.1, 1531.3, 1350.3, 1462.4, 1428.2, 1485.5),
)
