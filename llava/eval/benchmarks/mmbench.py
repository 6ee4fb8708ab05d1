"""MMBench dev (English): 4,377 rows = 1,176 questions in two to four rotations of their options.

The headline is circular accuracy: a question counts only if it is right in all its rotations (index modulo
1,000,000 names it); `vanilla` looks at the unrotated rows alone. An answer is matched to an option by
VLMEvalKit's rules without a judge: one option letter standing as a word, else one option's text contained
in the answer. `llava submit mmbench` writes the xlsx the OpenCompass server takes.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import msgspec

from llava.eval.benchmarks import base
from llava.eval.mmbench_sheet import write_sheet
from llava.eval.questions import Sample
from llava.eval.reading import read_table

ROTATION = 1_000_000
OPTIONS = "ABCD"
EN = "mmbench/mmbench_dev_20230712.tsv"


class Row(msgspec.Struct):
    index: Annotated[int, msgspec.Meta(ge=0, lt=100 * ROTATION)]
    question: str
    A: str
    B: str
    C: str = ""
    D: str = ""
    hint: str = ""
    answer: str = ""
    category: str = ""
    l2_category: str = msgspec.field(name="l2-category", default="")
    image: str = ""


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    file = questions or root / EN
    samples, images = [], dict[str, str]()
    for _, row in read_table(file, Row):
        # Newer releases store a picture once; other rows hold the index of the row that has it.
        image = images[str(row.index)] = images.get(row.image) or f"data:image;base64,{row.image}"
        options = tuple(takewhile(bool, (row.A, row.B, row.C, row.D)))
        stem = f"{row.hint}\n{row.question}" if row.hint else row.question
        text, unit, where = question_text(stem, options), str(row.index % ROTATION), str(file)
        label = (row.answer, row.l2_category) if row.answer else None
        samples.append(Sample(row.index, text, image, unit, where, row.category, label, stem, options))
    return samples


def question_text(stem: str, options: Sequence[str]) -> str:
    """Hint and question, then one line an option."""
    return "\n".join((stem, *(f"{letter}. {text}" for letter, text in zip(OPTIONS, options, strict=False))))


def read_answer(text: str, options: tuple[str, ...]) -> str | None:
    """The option an answer names, by VLMEvalKit's rules; Z where it says so; None where it is unclear."""
    letters = OPTIONS[: len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    lowered = text.lower()
    said = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in lowered]
    return said[0] if len(said) == 1 else None


def measure(unit: base.Unit) -> dict[str, float]:
    """The rotations of one question. It counts in `circular` only where all of them are answered."""
    right = [answer is not None and read_answer(answer, s.options) == s.reference[0] for s, answer in unit]
    first, counts = unit[0][0], dict[str, float]()
    if all(answer is not None for _, answer in unit):
        counts |= base.tally(all(right), f"category/{first.category}", f"l2/{first.reference[1]}")
    for (sample, answer), one in zip(unit, right, strict=True):
        if sample.id < ROTATION and answer is not None:
            counts |= {"vanilla/n": 1, "vanilla/right": one}
    return counts


def metrics(sums: base.Counts) -> dict:
    return {
        "circular": base.percent(sums),
        "vanilla": base.percent(sums, "vanilla"),
        "by_category": base.percent_by(sums, "category"),
        "by_l2_category": base.percent_by(sums, "l2"),
    }


def write(out: Path, root: Path, answers: Mapping[str, str], questions: Path | None = None) -> None:
    write_sheet(out, read_table(questions or root / EN, Row), answers)


SOURCE = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
BENCHMARK = base.Benchmark(
    name="mmbench",
    title="MMBench dev",
    version="dev 20230712",
    questions=4_377,
    headline="circular",
    files=(base.DataFile(EN, 4_377, f"{SOURCE}/mmbench_dev_20230712.tsv", "ask, score, submit"),),
    load=load,
    prompt=base.text_and_letter,
    recorded=lambda sample, asked: sample.text,
    measure=measure,
    metrics=metrics,
    unscored="this TSV has no answers; `llava submit` writes what the server scores.",
    write=write,
    max_new_tokens=1024,
    published=(64.3, 66.1, 64.69, 20.02, 67.7, 60.9, 64.9, 62.3, 65.7),
)
