"""The answers file of a run that may be killed at any moment and shared by any number of processes.

Beside `pope.jsonl`, the answers themselves, lie

    pope.provenance.json   what the run is; only a run that is the same may add answers
    pope.log               JSON Lines: what each unit of work took, questions that could not be asked
    pope.lock              empty; its byte ranges are locked, by the process, not by its content

A unit of work is claimed by locking its byte. The system drops the locks of a process that dies, however it
dies, so its unit is free again and another process takes it over. Answers are appended in whole lines under
a lock of their own; the first to come after a torn line cuts it off. Before it writes, a process reads what
others wrote: no question is answered twice, none is lost. That also holds between processes that cut the
questions into other units; they may only do some work in vain.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.eval.answers import parse_answer, parse_object
from llava.eval.provenance import Files, differences, read_run, update_json
from llava.files import write_text

WRITER = 0  # the byte whose lock lets a process write; unit n has byte n + 1
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Question:
    """What the store knows of a question: what its line in the answers file will hold, and its unit."""

    id: str | int
    prompt: str
    unit: int


class Store:
    """Opens (or makes) the answers file of `questions`; `identity` says what the run is, None to look only.

    Raises UserError where the file belongs to another run (the difference is named), holds answers to other
    questions, or is damaged anywhere but in its last line.
    """

    def __init__(self, answers: Path, questions: Sequence[Question], identity: dict[str, Any] | None):
        self.files = Files(answers)
        self.questions = questions
        self.units: dict[int, list[int]] = {}
        self._same: dict[tuple[str, str], list[int]] = {}  # questions that only their order tells apart
        for index, question in enumerate(questions):
            self.units.setdefault(question.unit, []).append(index)
            self._same.setdefault((str(question.id), question.prompt), []).append(index)
        self.answered: set[int] = set()
        self.problems: dict[int, str] = {}
        self._read_answers_to = self._read_lines = 0
        answers.parent.mkdir(parents=True, exist_ok=True)
        # One descriptor for the life of the process: closing another one would drop all its locks.
        self._lock = os.open(self.files.lock, os.O_RDWR | os.O_CREAT, 0o644)
        self._answers = os.open(answers, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._log = os.open(self.files.log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with self._writing():
            if identity is not None:
                self._agree(identity)
            _cut_torn_line(self._answers)
            _cut_torn_line(self._log)
            # A run tries again what failed in earlier ones; who only looks wants to know of it.
            self._read_log_to = os.fstat(self._log).st_size if identity is not None else 0
            self._refresh()

    def close(self) -> None:
        for descriptor in (self._answers, self._log, self._lock):
            os.close(descriptor)

    @property
    def open_questions(self) -> int:
        """Questions nobody has answered or failed at."""
        return len(self.questions) - len(self.answered | self.problems.keys())

    def pending(self, unit: int) -> list[int]:
        """The questions of a unit that are still to be asked."""
        return [i for i in self.units[unit] if i not in self.answered and i not in self.problems]

    def claims(self) -> Iterator[int]:
        """Units with open questions that nobody else works on, each locked until `release`."""
        for unit in self.units:
            if self.pending(unit) and self._try_lock(unit):
                with self._writing():
                    self._refresh()
                if self.pending(unit):
                    yield unit
                else:
                    self.release(unit)

    def wait(self) -> None:
        """Some units are in other hands: look again in a moment, in case these hands die."""
        time.sleep(POLL_SECONDS)
        with self._writing():
            self._refresh()

    def release(self, unit: int) -> None:
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, unit + 1)

    def write(self, rows: dict[int, dict[str, Any]]) -> None:
        """Append the answers of some questions, one line each, whole lines only."""
        with self._writing():
            self._refresh()
            new = {index: row for index, row in rows.items() if index not in self.answered}
            _cut_torn_line(self._answers)
            _append(self._answers, "".join(json.dumps(row) + "\n" for row in new.values()))
            self._refresh()

    def fail(self, index: int, problem: str) -> None:
        """Record that a question could not be asked. It has no answer, and the next run tries it again."""
        self.problems[index] = problem
        question = self.questions[index]
        self.note({"problem": problem, "question_id": question.id, "prompt": question.prompt})

    def note(self, event: dict[str, Any]) -> None:
        """A line for the log."""
        with self._writing():
            _cut_torn_line(self._log)
            _append(self._log, json.dumps(event) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All lines of the log, of all processes and all runs."""
        with open(self.files.log, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def update_provenance(self, **more: Any) -> None:
        """Set entries of the provenance file."""
        with self._writing():
            update_json(self.files.provenance, **more)

    # --- under the hood ---

    def _agree(self, identity: dict[str, Any]) -> None:
        """Write what the run is, or make sure that it is the run the file belongs to."""
        answers, provenance = self.files.answers, self.files.provenance
        empty = os.fstat(self._answers).st_size == 0
        if not provenance.exists():
            if not empty:
                raise UserError(
                    f"{answers} holds answers, and no {provenance.name} beside it says what made them. "
                    "Give another --answers file, or --overwrite."
                )
            write_text(provenance, json.dumps({"run": identity}, indent=2) + "\n")
            return
        before = read_run(provenance)
        now = json.loads(json.dumps(identity))
        if different := differences(before, now):
            raise UserError(
                f"{answers} belongs to another run ({different}). Give another --answers file, "
                "or --overwrite."
            )

    def _refresh(self) -> None:
        """Take in the whole lines that were added since the last look."""
        for line in _lines_from(self._answers, self._read_answers_to):
            self._read_lines += 1
            self._read_answers_to += len(line)
            if line.strip():
                self._take(line, f"{self.files.answers}:{self._read_lines}")
        for line in _lines_from(self._log, self._read_log_to):
            self._read_log_to += len(line)
            event = json.loads(line)
            if "problem" in event:
                for index in self._same.get((str(event["question_id"]), event["prompt"]), ()):
                    self.problems[index] = event["problem"]

    def _take(self, line: bytes, where: str) -> None:
        try:
            row = parse_answer(where, parse_object(line.decode("utf-8")))
        except ValueError as error:
            raise UserError(f"{where}: {error}. Give another --answers file, or --overwrite.") from error
        same = self._same.get((row.id, row.prompt), [])
        index = next((index for index in same if index not in self.answered), None)
        if index is None:
            what = "is answered twice" if same else "is not asked in this run"
            raise UserError(
                f"{where}: question {row.id} {what}. Give another --answers file, or --overwrite."
            )
        self.answered.add(index)

    def _try_lock(self, unit: int) -> bool:
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit + 1)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, WRITER)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, WRITER)


def _append(descriptor: int, text: str) -> None:
    data = memoryview(text.encode("utf-8"))
    while data:
        data = data[os.write(descriptor, data) :]


def _lines_from(descriptor: int, start: int) -> list[bytes]:
    """The whole lines from byte `start` on."""
    size = os.fstat(descriptor).st_size - start
    data = os.pread(descriptor, size, start) if size > 0 else b""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def _cut_torn_line(descriptor: int) -> None:
    """Drop what follows the last newline: a line whose writer was killed."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, end)


def remove(answers: Path) -> None:
    """Forget a run."""
    for file in Files(answers).all():
        file.unlink(missing_ok=True)


def units_of(groups: Sequence[str], size: int) -> list[int]:
    """The unit of each question: whole groups (the questions of one image) in order of first appearance, a
    new unit as soon as one holds `size` questions."""
    members: dict[str, int] = {}
    for group in groups:
        members[group] = members.get(group, 0) + 1
    unit_of, unit, filled = {}, 0, 0
    for group, count in members.items():
        if filled >= size:
            unit, filled = unit + 1, 0
        unit_of[group] = unit
        filled += count
    return [unit_of[group] for group in groups]


def unit_size(questions: int, processes: int = 1) -> int:
    """Questions a unit: large enough to batch and to reuse images, small enough to share out at the end.

    With few questions, at least four units a process, or some would find nothing to do.
    """
    size = min(256, max(32, questions // 64))
    return size if processes == 1 else max(1, min(size, questions // (4 * processes)))
