"""What made an answers file: the files of a run, and how two runs are told apart. Needs no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.files import write_text


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

    @property
    def lock(self) -> Path:
        return self._beside(".lock")

    def _beside(self, suffix: str) -> Path:
        return self.answers.with_name(self.answers.name.removesuffix(".jsonl") + suffix)

    def all(self) -> tuple[Path, ...]:
        return self.answers, self.provenance, self.log, self.lock


def read_run(provenance: Path) -> dict[str, Any]:
    """What the run is; UserError where the file is damaged."""
    try:
        run = json.loads(provenance.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{provenance} is damaged; give another --answers file, or --overwrite.") from error
    return run


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


def update_json(file: Path, **more: Any) -> None:
    """Set entries of an object on disk, which is replaced as a whole."""
    write_text(file, json.dumps(json.loads(file.read_text(encoding="utf-8")) | more, indent=2) + "\n")


def mixed_runs(answers: Sequence[Path]) -> list[str]:
    """Chunks that another run made than the first one, with the difference; files without provenance pass."""
    known = [(file, read_run(Files(file).provenance)) for file in answers if Files(file).provenance.exists()]
    problems = []
    for file, run in known[1:]:
        first, made = ({name: x for name, x in one.items() if name != "chunk"} for one in (known[0][1], run))
        if different := differences(first, made):
            problems.append(f"{file}: of another run than {known[0][0]} ({different})")
    return problems
