"""The answers file of a run that may be killed at any moment, and that several processes may share.

One process appends whole lines to NAME.jsonl itself. Each of several writes NAME.part0, NAME.part1, ... of
its own, and `merge` appends these to NAME.jsonl at the end. Whoever starts cuts a torn last line off its file
and reads all of them: what has an answer in any is not asked again, however many processes there were before.
A file is locked by the process that writes it, and the system drops that lock when the process dies.
"""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.eval.provenance import REMEDY, Files


class AnswersFile:
    """The file this process appends answers to.

    Args:
        path: NAME.jsonl.
        part: the number of this process among several; None: it writes NAME.jsonl.
        lines: what each question's line will hold, of which `question_id` and `prompt` tell whose answer a
            line is. Questions in which both are equal are told apart by their order, so that one process must
            answer all of them (they are about one image).

    Raises:
        UserError: another process still writes it after WAIT_SECONDS.
    """

    WAIT_SECONDS = 10.0  # what was killed with its helpers may need a moment to be gone

    def __init__(self, path: Path, lines: Sequence[dict[str, Any]], part: int | None = None):
        self.path, self.lines = path, lines
        path.parent.mkdir(parents=True, exist_ok=True)
        self.own = path if part is None else Files(path).part(part)
        self._descriptor = self._lock(self.own, self.WAIT_SECONDS)
        whole = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0).rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if os.fstat(self._descriptor).st_size == 0 and _is_at(self.own, self._descriptor):
                self.own.unlink()  # a command that failed before its first answer leaves nothing behind
        finally:
            os.close(self._descriptor)

    def append(self, row: dict[str, Any]) -> None:
        self._write(f"{json.dumps(row)}\n".encode())

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def answered(self) -> dict[int, tuple[Path, bytes]]:
        """{index of a question: (the file, the line)} of all that have an answer, in whichever file.

        Raises:
            UserError: a line that is damaged, that answers no question of this run, or NAME.jsonl answers one
                twice. (Two processes may: the later one's answer is not taken.)
        """
        places: dict[tuple[str, str], list[int]] = {}
        for index in reversed(range(len(self.lines))):
            asked = self.lines[index]
            places.setdefault((str(asked["question_id"]), asked["prompt"]), []).append(index)
        found: dict[int, tuple[Path, bytes]] = {}
        seen: set[bytes] = set()
        for file in [self.path, *Files(self.path).parts]:
            for number, line in enumerate(_whole_lines(file), 1):
                where = f"{file}:{number}"
                # In a part and in NAME.jsonl: the merge was killed before it deleted the part.
                if not line.strip() or (file != self.path and line in seen):
                    continue
                seen.add(line)
                try:
                    row = json.loads(line)
                    identifier, prompt = str(row["question_id"]), row["prompt"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{where} is not the answer to a question. {REMEDY}") from error
                open_places = places.get((identifier, prompt))
                if open_places:
                    found[open_places.pop()] = (file, line)
                elif open_places is None:
                    raise UserError(f"{where}: question {identifier} is not asked in this run. {REMEDY}")
                elif file == self.path:
                    raise UserError(f"{where}: question {identifier} is answered twice. {REMEDY}")
        return found

    def merge(self) -> None:
        """Append to NAME.jsonl what stands in the parts, then delete these. Waits for who still writes one.

        Killed in between, the next merge finds lines in both files and takes them once. Call it where this
        process has NAME.jsonl.
        """
        parts = Files(self.path).parts
        with contextlib.ExitStack() as opened:
            for part in parts:
                opened.callback(os.close, self._lock(part, math.inf))
            self._write(b"".join(line for file, line in self.answered().values() if file in parts))
            for part in parts:
                part.unlink()

    @staticmethod
    def _lock(path: Path, seconds: float) -> int:
        """Opens a file, which is made if need be, for this process alone."""
        deadline = time.monotonic() + seconds
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, descriptor):
                    return descriptor  # and not a part that was merged and deleted meanwhile
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise UserError(
                        f"another process is writing {path}: wait for it, or give another --answers file."
                    ) from None
                time.sleep(0.1)
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether this open file is still the one with that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _whole_lines(file: Path) -> list[bytes]:
    """The lines that have an end; none of a file that is not there (or was merged a moment ago)."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
