"""MMBench dev (English): 4,377 rows = 1,176 questions in two to four rotations of their options.

The headline is circular accuracy: a question counts only if it is right in all its rotations (index modulo
1,000,000 names it); `vanilla` looks at the unrotated rows alone. An answer is matched to an option by
VLMEvalKit's rules without a judge: one option letter standing as a word, else one option's text contained
in the answer. `llava submit mmbench` writes the xlsx the OpenCompass server takes. Published: LLaVA-1.5-7B
64.3.
"""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llava.errors import UserError
from llava.eval.benchmarks.base import (
    LETTER,
    Benchmark,
    Counts,
    DataFile,
    Embedded,
    Sample,
    Totals,
    Unit,
    percent,
    percent_by,
    require,
)

ROTATION = 1_000_000
OPTIONS = "ABCD"
DROPPED = frozenset(("hint", "category", "source", "image", "comment", "l2-category"))
PREDICTION_COLUMN = 6  # where the server's sheet has the predictions
EN = "mmbench/mmbench_dev_20230712.tsv"


def read_table(file: Path) -> Iterator[dict[str, str]]:
    """Rows of the TSV as text: an empty cell is absent, and `None`, `NA` or `1` are what they say."""
    csv.field_size_limit(1 << 30)  # pictures are cells
    with open(require(file), encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream, delimiter="\t")
        missing = {"index", "question", "A", "B"} - set(table.fieldnames or ())
        if missing:
            raise UserError(f"{file}: no column {', '.join(sorted(missing))}; this is no MMBench TSV.")
        for row in table:
            if None in row or None in row.values() or not row["index"].isdigit():
                raise UserError(f"{file}:{table.line_num}: this row is torn; fetch the file again.")
            yield row


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    file = questions or root / EN
    samples, images = [], {}
    for row in read_table(file):
        index = int(row["index"])
        # Newer releases store a picture once; other rows hold the index of the row that has it.
        image = images.get(row["image"], row["image"])
        images[row["index"]] = image
        options = []
        for letter in OPTIONS:
            if not row.get(letter):
                break
            options.append(row[letter])
        stem = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        answer = row.get("answer")
        samples.append(
            Sample(
                index,
                question_text(stem, options),
                Embedded(image),
                unit=str(index % ROTATION),
                where=str(file),
                category=row.get("category", ""),
                reference=(answer, row.get("l2-category", "")) if answer else None,
                options=tuple(options),
                stem=stem,
            )
        )
    return samples


def question_text(stem: str, options: Sequence[str]) -> str:
    """Hint and question, then one line an option."""
    return "\n".join((stem, *(f"{letter}. {text}" for letter, text in zip(OPTIONS, options, strict=False))))


def prompt(sample: Sample, protocol: str = "", *, suffix: str = LETTER) -> str:
    return sample.text + suffix


def read_answer(text: str, options: tuple[str, ...]) -> str | None:
    """The option an answer names, by VLMEvalKit's rules; Z where it says so; None where it is unclear."""
    letters = OPTIONS[: len(options)]
    words = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    lowered = text.lower()
    said = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in lowered]
    return said[0] if len(said) == 1 else None


def measure(unit: Unit) -> Counts:
    """The rotations of one question. It counts in `circular` only where all of them are answered."""
    right = [
        answer is not None and read_answer(answer, sample.options) == sample.reference[0]
        for sample, answer in unit
    ]
    counts: Counts = {}
    for (sample, answer), one in zip(unit, right, strict=True):
        if sample.id < ROTATION and answer is not None:
            counts |= {"vanilla/n": 1.0, "vanilla/right": float(one)}
    if all(answer is not None for _, answer in unit):
        base = unit[0][0]
        for name in ("circular", f"category/{base.category}", f"l2/{base.reference[1]}"):
            counts |= {f"{name}/n": 1.0, f"{name}/right": float(all(right))}
    return counts


def metrics(totals: Totals) -> dict:
    return {
        "circular": percent(totals["circular/right"], totals["circular/n"]),
        "vanilla": percent(totals["vanilla/right"], totals["vanilla/n"]),
        "by_category": percent_by(totals, "category"),
        "by_l2_category": percent_by(totals, "l2"),
    }


def write(out: Path, root: Path, answers: Mapping[str, str]) -> None:
    write_sheet(out, root / EN, answers)


def write_sheet(out: Path, questions: Path, answers: Mapping[str, str]) -> None:
    """The server's sheet: `index question A B C D prediction answer split`, an empty answer left blank."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise UserError(
            "The MMBench server takes an xlsx: `pip install 'llava[eval]'` brings openpyxl."
        ) from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def text(value: str) -> object:
        if not value:
            return None
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        cell.data_type = "s"  # an answer that starts with = is no formula
        return cell

    for number, row in enumerate(read_table(questions)):
        columns = [name for name in row if name not in DROPPED and name != "index"]
        if number == 0:
            header = ["index", *columns]
            header.insert(PREDICTION_COLUMN, "prediction")
            sheet.append(header)
        cells = [int(row["index"]), *(text(row[name]) for name in columns)]
        cells.insert(PREDICTION_COLUMN, text(answers.get(row["index"], "")))
        sheet.append(cells)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    book.save(beside)
    os.replace(beside, out)


OPENMMLAB = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
BENCHMARK = Benchmark(
    name="mmbench",
    title="MMBench dev",
    version="dev 20230712",
    questions=4_377,
    headline="circular",
    files=(DataFile(EN, 4_377, f"{OPENMMLAB}/mmbench_dev_20230712.tsv", "ask, score, submit"),),
    load=load,
    prompt=prompt,
    recorded=lambda sample, asked: sample.text,
    measure=measure,
    metrics=metrics,
    unscored="this TSV has no answers; `llava submit` writes what the server scores.",
    write=write,
    max_new_tokens=1024,
)
