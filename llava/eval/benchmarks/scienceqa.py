"""ScienceQA test, 4,241 questions, 2,017 of them with a picture; headline: accuracy on those (IMG).

Which questions have a picture is read from problems.json, never from the answers. The answer is one letter
A to E, or `A. ...`, or one sentence `The answer is A.`; all else is wrong, as upstream's parser has it. The
published figures were made with protocol `crop`; with `pad` LLaVA-1.5-7B has 69.5 in place of 66.8.
"""

import re
from functools import partial
from pathlib import Path

import msgspec

from llava.errors import UserError
from llava.eval.benchmarks import base
from llava.eval.questions import LETTERS, Sample, conversation_file, labelled, read_conversations, with_tag
from llava.eval.reading import read_json

FOLDER = "scienceqa"
QUESTIONS = "llava_test_CQM-A.json"
IMAGES = "images/test"


class Problem(msgspec.Struct):
    question: str
    choices: list[str]
    answer: int
    hint: str = ""
    image: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices) <= len(LETTERS):
            raise ValueError(f"the answer {self.answer} is none of {len(self.choices)} choices")


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    folder = root / FOLDER
    file = questions or folder / QUESTIONS
    labels = read_labels(folder) if (folder / "problems.json").exists() else None
    read = partial(read_conversations, file, folder / IMAGES)
    return labelled(file, read, labels, folder / "pid_splits.json", whole=questions is None)


def read_labels(folder: Path, split: str = "test") -> list[Sample]:
    """A split's questions, made of problems. Reference: right choice, number of choices, has a picture."""
    file, splits_file = folder / "problems.json", folder / "pid_splits.json"
    problems = read_json(file, dict[str, Problem])
    splits = read_json(splits_file, dict[str, list[int | str]])
    if split not in splits:
        raise UserError(f"{splits_file}: there is no split {split!r}: {', '.join(splits)}.")
    samples = []
    for identifier in map(str, splits[split]):
        if identifier not in problems:
            raise UserError(f"{file}: question {identifier} of the {split} split is missing.")
        one = problems[identifier]
        hint = f"Context: {one.hint}\n" if one.hint else ""
        options = "".join(f"\n{LETTERS[i]}. {choice}" for i, choice in enumerate(one.choices))
        text, where = (hint + one.question + options).strip(), str(file)
        unit = f"{identifier}/{one.image}" if one.image else identifier
        image = folder / IMAGES / unit if one.image else None
        reference = one.answer, len(one.choices), image is not None
        samples.append(Sample(identifier, text, image, unit, where, reference=reference))
    return samples


def rebuild(root: Path) -> str:
    labels = read_labels(root / FOLDER)
    return conversation_file((label, LETTERS[label.reference[0]]) for label in labels)


def read_answer(text: str) -> str | None:
    """The letter an answer names, or None."""
    if re.match(r"[A-E](\Z|\. )", text):
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


def judge(sample: Sample, answer: str) -> dict[str, float]:
    right_index, _, has_image = sample.reference
    letter = read_answer(answer)
    right = letter is not None and LETTERS.index(letter) == right_index
    return base.tally(right, *(["image"] if has_image else []))


def metrics(sums: base.Counts) -> dict:
    return {
        "img_accuracy": base.percent(sums, "image"),
        "accuracy": base.percent(sums),
        **{f"img_{name}": sums[f"image/{name}"] for name in ("n", "right")},
        **{name: sums[f"all/{name}"] for name in ("n", "right")},
    }


SOURCE = "https://github.com/lupantech/ScienceQA, data/scienceqa"
BENCHMARK = base.Benchmark(
    name="scienceqa",
    title="ScienceQA test (IMG)",
    version="test split, CQM-A",
    questions=4_241,
    headline="img_accuracy",
    files=(
        base.DataFile(f"{FOLDER}/{QUESTIONS}", 4_241, base.BUNDLE, "ask", rebuild),
        base.DataFile(f"{FOLDER}/problems.json", 21_208, SOURCE, "score"),
        base.DataFile(f"{FOLDER}/pid_splits.json", None, SOURCE, "score"),
        base.DataFile(f"{FOLDER}/{IMAGES}", 2_017, SOURCE, "ask"),
    ),
    load=load,
    prompt=base.text_and_letter,
    recorded=with_tag,
    measure=base.per_question(judge),
    metrics=metrics,
    unscored=f"{FOLDER}/problems.json and pid_splits.json are missing; they hold the answers.",
    protocols=(
        base.Protocol("pad", "images padded to a square as the checkpoint says (upstream since 2024-01-31)"),
        base.Protocol("crop", "the centre of the resized image (upstream before; PruMerge's fork)", "square"),
    ),
    max_new_tokens=1024,
    published=(66.8, 68.4, 69.51, 63.06, 71.6, 68.5, 68.3, 71.0, 71.0),
)
