"""Reading answers files and joining them to the questions by id, never by position.

An answers file is JSON Lines, one object a question: `question_id, prompt, text, answer_id, model_id,
metadata`. Everything that would make a score wrong without an error is found here and named with its file
and line: torn or glued lines, a chunk that is not there, ids answered twice, ids nobody asked for,
questions without an answer.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import UserError, first_line


@dataclass(frozen=True, slots=True)
class Row:
    """One answer as it stands in the file."""

    where: str  # file:line
    id: str  # question_id as text: 7 and "7" are the same question
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What the join must know of one question."""

    key: str  # equal for questions that nothing but their order tells apart
    id: str | int
    text: str
    where: str  # file:line, or the file
    required: bool = True

    @property
    def label(self) -> str:
        """How a person recognises it."""
        return f"{self.id} ({' '.join(self.text.split())[:60]!r})"


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
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON object, torn or glued ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, here is a {type(value).__name__}")
    return value


def parse_answer(where: str, data: dict[str, Any]) -> Row:
    """One line of an answers file; ValueError says what it lacks."""
    for key in ("question_id", "text"):
        if key not in data:
            raise ValueError(f"no {key!r} in this line")
    if not isinstance(data["text"], str):
        raise ValueError(f"'text' of question {data['question_id']} is no string")
    prompt = data.get("prompt")
    return Row(where, str(data["question_id"]), prompt if isinstance(prompt, str) else "", data["text"])


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
    asked: Sequence[Asked], rows: Iterable[Row], find: Callable[[Row], str | None]
) -> tuple[list[Row | None], list[str]]:
    """(the row of each question in the questions' order, None where it has none; what is wrong).

    `find(row)` is the key of the question a row answers, None for none. Of two answers to one question the
    later counts, as in the upstream converters, and the repetition is reported.
    """
    slots: dict[str, list[int]] = {}
    for index, question in enumerate(asked):
        slots.setdefault(question.key, []).append(index)
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
        f"{question.where}: question {question.label} has no answer"
        for question, row in zip(asked, joined, strict=True)
        if row is None and question.required
    ]
    return joined, problems
