"""Reading answers files and joining them to the questions by id, never by position.

An answers file is JSON Lines, one object a question: `question_id, prompt, text, answer_id, model_id,
metadata`. Everything that would make a score wrong without an error is found here and named with its file
and line: torn or glued lines, a chunk that is not there, ids answered twice, ids nobody asked for,
questions without an answer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llava.errors import UserError, first_line
from llava.eval.questions import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """One answer as it stands in the file."""

    where: str  # file:line
    id: str  # question_id as text: 7 and "7" are the same question
    prompt: str
    text: str


class AnswerLine(msgspec.Struct):
    """What is needed of a line of an answers file."""

    question_id: Any
    text: str
    prompt: Any = ""


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without the line end) of every line that is not blank.

    Bytes that are no UTF-8 become replacement characters. Raises UserError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def parse_object(line: str) -> dict[str, Any]:
    """One line as a JSON object; ValueError says why it is none."""
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"no JSON object, torn or glued ({first_line(error)})") from error


def parse_answer(where: str, data: dict[str, Any]) -> Row:
    """One line of an answers file; ValueError says what it lacks."""
    line = msgspec.convert(data, AnswerLine)
    return Row(where, str(line.question_id), line.prompt if isinstance(line.prompt, str) else "", line.text)


def read_answers(
    paths: Sequence[Path], parse: Callable[[str, dict[str, Any]], Row] = parse_answer
) -> tuple[list[Row], list[str]]:
    """All rows of the files in their order, and what is wrong with the lines that gave none.

    A file of several that does not exist is a problem (a lost chunk); UserError if none of them exists.
    """
    rows: list[Row] = []
    problems: list[str] = []
    if not any(path.is_file() for path in paths):
        raise UserError(f"{paths[0]}: no such answers file.")
    for path in paths:
        if not path.is_file():
            problems.append(f"{path}: no such file; a chunk of the answers is missing")
            continue
        for number, line in numbered_lines(path):
            where = f"{path}:{number}"
            try:
                rows.append(parse(where, parse_object(line)))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    return rows, problems


def join(
    samples: Sequence[Sample],
    rows: Iterable[Row],
    find: Callable[[Row], str | None],
    others: Sequence[Sample] = (),
) -> tuple[list[Row | None], list[str]]:
    """(the row of each of `samples` and `others` in their order, None where it has none; what is wrong).

    `find(row)` is the key of the question a row answers, None for none; equal keys are answered in the order
    of the rows. `others` may be answered, `samples` must be. Of two answers to one question the later
    counts, as in the upstream converters, and the repetition is reported.
    """
    asked = [*samples, *others]
    slots: dict[str, list[int]] = {}
    for index, sample in enumerate(asked):
        slots.setdefault(sample.key, []).append(index)
    joined: list[Row | None] = [None] * len(asked)
    filled = dict.fromkeys(slots, 0)
    problems: list[str] = []
    for row in rows:
        key = find(row)
        if key not in slots:
            shown = " ".join(row.prompt.split())[:80]
            problems.append(f"{row.where}: unknown question {row.id}" + (f" ({shown!r})" if shown else ""))
            continue
        index = slots[key][min(filled[key], len(slots[key]) - 1)]
        if earlier := joined[index]:
            problems.append(
                f"{row.where}: duplicate answer to question {asked[index].label}, also at {earlier.where}"
            )
        joined[index] = row
        filled[key] += 1
    problems += [
        f"{sample.where}: question {sample.label} has no answer"
        for sample, row in zip(samples, joined, strict=False)
        if row is None
    ]
    return joined, problems
