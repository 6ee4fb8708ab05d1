"""MME, 2,374 yes/no questions, two an image, in 14 subtasks.

Per subtask: acc = right answers, acc+ = images with both right, score = 100 acc + 100 acc+. The headline is
Perception, the sum over ten subtasks (at most 2000); Cognition sums the other four (at most 800). An answer
is read as the official tool reads it, from its first four characters. Pairs are formed by image, not by
line.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava.errors import UserError
from llava.eval.answers import numbered_lines
from llava.eval.benchmarks import base
from llava.eval.reading import jsonl, require

RELEASE = "MME/MME_Benchmark_release_version"
QUESTIONS = "MME/llava_mme.jsonl"
ASK = "Please answer yes or no."
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def load(root: Path, questions: Path | None = None) -> list[base.Sample]:
    file, release = questions or root / QUESTIONS, root / RELEASE
    labels = read_labels(release) if release.is_dir() else None
    samples = base.labelled_questions(file, release, labels, release, whole=questions is None, key=key)
    return [replace(sample, category=subtask_of(sample.id)) for sample in samples]


def subtask_of(identifier: object) -> str:
    return str(identifier).partition("/")[0]


def key(identifier: object, text: str) -> str:
    """<subtask>/<name> of the image, wherever in the subtask's folder it lies and whatever it ends in, and
    the question."""
    name = str(identifier).rpartition("/")[2]
    return base.by_id_and_question(f"{subtask_of(identifier)}/{name.rpartition('.')[0] or name}", text)


def read_labels(release: Path, images_needed: bool = False) -> list[tuple[str, base.Question, str]]:
    """(file, row of the question file, yes | no) of each line of the txt files.

    Answers can be scored without the images, which only say whether a name ends in jpg or png.
    """
    rows = []
    for subtask in sorted((*PERCEPTION, *COGNITION)):
        folder = release / subtask
        images = folder / "images" if (folder / "images").is_dir() else folder
        texts = folder / "questions_answers_YN"
        names = {file.stem: file.name for file in sorted(images.glob("*")) if file.suffix != ".txt"}
        for file in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            if images_needed and file.stem not in names:
                raise UserError(f"{images}: no image for {file}.")
            image = f"{images.relative_to(release).as_posix()}/{names.get(file.stem, f'{file.stem}.jpg')}"
            for number, line in numbered_lines(file):
                text, _, label = line.strip().rpartition("\t")
                if label.strip().lower() not in ("yes", "no"):
                    raise UserError(f"{file}:{number}: `question<TAB>Yes|No` is expected, here is {line!r}.")
                question = " ".join(text.strip().removesuffix(ASK).split()) + base.SHORT
                rows.append(
                    (str(file), base.Question(image, image, question, subtask), label.strip().lower())
                )
    return rows


def rebuild(root: Path) -> str:
    return jsonl(row for _, row, _ in read_labels(require(root / RELEASE), images_needed=True))


def read_answer(text: str) -> str:
    """yes, no or other, as the official tool reads it (from the first four characters)."""
    text = text.replace("\n", " ").replace("\t", " ").lower()
    if text in ("yes", "no"):
        return text
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def measure(unit: base.Unit) -> dict[str, float]:
    """The questions of one image. acc+ counts the image only where all of them are answered."""
    counts: Counter[str] = Counter()
    for sample, answer in unit:
        if answer is not None:
            said = read_answer(answer)
            right = said == sample.reference
            cell = "other" if said == "other" else ("T" if right else "F") + ("P" if said == "yes" else "N")
            counts.update({"n": 1, "right": right, cell: 1})
    if counts["n"] == len(unit):
        counts.update(images=1, both=counts["right"] == len(unit))
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

    def total(group: tuple[str, ...]) -> object:
        scores = [subtasks[subtask]["score"] for subtask in group if subtask in subtasks]
        return sum(scores) if scores else np.nan

    return {"perception": total(PERCEPTION), "cognition": total(COGNITION), "subtasks": subtasks}


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
