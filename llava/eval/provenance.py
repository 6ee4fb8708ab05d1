"""What made an answers file: NAME.provenance.json and NAME.log beside it, and how two runs are told apart.

The log is JSON Lines that every process of a run appends: where it ran, what answers took, questions that
could not be asked. Importing this needs no torch.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UserError
from llava.files import write_json

REMEDY = "Give another --answers file, or --overwrite."


@dataclass(frozen=True)
class Files:
    """The files of one run."""

    answers: Path

    @property
    def provenance(self) -> Path:
        return self._beside(".provenance.json")

    @property
    def log(self) -> Path:
        return self._beside(".log")

    def part(self, number: int) -> Path:
        """What process `number` of several writes."""
        return self._beside(f".part{number}")

    @property
    def parts(self) -> list[Path]:
        return sorted(self.answers.parent.glob(glob.escape(self._beside(".part").name) + "*"))

    def _beside(self, suffix: str) -> Path:
        return self.answers.with_name(self.answers.name.removesuffix(".jsonl") + suffix)

    def remove(self) -> None:
        """Forget a run."""
        for file in (self.answers, self.provenance, self.log, *self.parts):
            file.unlink(missing_ok=True)

    def note(self, **event: Any) -> None:
        """A line for the log, in one write; the line end in front parts it from a torn one."""
        with open(self.log, "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(event)}\n".encode())

    def events(self) -> Iterator[dict[str, Any]]:
        """What the log holds, without torn lines."""
        for line in self.log.read_bytes().splitlines() if self.log.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def update(self, **entries: Any) -> None:
        """Set entries of the provenance file."""
        write_json(self.provenance, json.loads(self.provenance.read_text(encoding="utf-8")) | entries)

    def agree(self, run: dict[str, Any]) -> None:
        """Write what the run is, or make sure that it is the run these answers belong to.

        Raises:
            UserError: they belong to another one (the difference is named), or nothing says to which.
        """
        if self.provenance.exists():
            if different := differences(read_run(self.provenance), json.loads(json.dumps(run))):
                raise UserError(f"{self.answers} belongs to another run ({different}). {REMEDY}")
        elif self.answers.exists() and self.answers.stat().st_size > 0:
            raise UserError(
                f"{self.answers} holds answers, and no {self.provenance.name} beside it says what made them. "
                + REMEDY
            )
        else:
            write_json(self.provenance, {"run": run})


def read_run(provenance: Path) -> dict[str, Any]:
    """What the run is; UserError where the file is damaged."""
    try:
        return json.loads(provenance.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{provenance} is damaged; give another --answers file, or --overwrite.") from error


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What two runs do not have in common, "" where they are the same."""
    before, now = _flat(before), _flat(now)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in names)


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"generation": {"seed": 0}} as {"generation.seed": 0}."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def mixed_runs(answers: Sequence[Path]) -> list[str]:
    """Chunks that another run made than the first one, with the difference; files without provenance pass."""
    known = [(file, read_run(Files(file).provenance)) for file in answers if Files(file).provenance.exists()]
    problems = []
    for file, run in known[1:]:
        first, made = ({name: x for name, x in one.items() if name != "chunk"} for one in (known[0][1], run))
        if different := differences(first, made):
            problems.append(f"{file}: of another run than {known[0][0]} ({different})")
    return problems


def summary(files: Files, lines: Sequence[dict[str, Any]], answered: Collection[int]) -> dict[str, Any]:
    """Tokens, time and problems of a run so far, over all its processes and restarts."""
    tokens: Counter[int] = Counter()
    seconds, questions = 0.0, 0
    problems: dict[int, str] = {}
    for event in files.events():
        tokens.update({int(count): images for count, images in event.get("visual_tokens", {}).items()})
        seconds += event.get("seconds", 0.0)
        questions += event.get("questions", 0)
        if "index" in event:
            problems[event["index"]] = event["problem"]
    ordered = np.repeat(sorted(tokens), [tokens[count] for count in sorted(tokens)])
    return {
        "questions": len(lines),
        "answered": len(answered),
        "problems": [
            {
                "question_id": line["question_id"],
                "problem": problems.get(index, "not answered yet: the same command takes what is missing"),
            }
            for index, line in enumerate(lines)
            if index not in answered
        ],
        "images": len(ordered),
        "visual_tokens": {
            "mean": float(ordered.mean()),
            "p50": float(np.percentile(ordered, 50)),
            "p95": float(np.percentile(ordered, 95)),
            "max": int(ordered.max()),
        }
        if len(ordered)
        else None,
        "device_seconds": round(seconds, 2),
        "questions_per_second": questions / seconds if seconds else None,
    }


def fingerprint(model_path: str, model_base: str | None) -> str:
    """16 hex digits of what a checkpoint (with its base) holds: configs, and size, head and tail of each
    weight file. Copying a checkpoint keeps it, training changes it."""
    from llava.model.checkpoints import inspect_checkpoint

    info = inspect_checkpoint(model_path, model_base)
    digest = hashlib.sha256()
    for one in (info, info.base):
        if one is None:
            continue
        digest.update(json.dumps([one.config, one.adapter_config], sort_keys=True, default=str).encode())
        for file in one.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                digest.update(stream.read(1 << 16))
                stream.seek(max(0, size - (1 << 16)))
                digest.update(stream.read())
    return digest.hexdigest()[:16]
