"""What every benchmark shares: a question, how it is found again, and a score with its interval.

A benchmark is one file of this folder that fills a `Benchmark`: `load` reads the official files, `prompt`
says what the model is asked, `measure` counts over the questions of one image, `metrics` turns the counts
into the figures papers print. Nothing here needs torch.

The interval is a bootstrap over images (not over questions: those of one image go wrong together), within
strata where a benchmark is a sum over fixed parts: 1,000 resamples, seed 0, from the 2.5th to the 97.5th
percentile.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UserError
from llava.eval.answers import Asked, Row, join, numbered_lines, parse_object, read_answers

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RESAMPLES = 1000
BUNDLE = "LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"

Counts = dict[str, float]
Totals = Mapping[str, Any]
"""Sums of counts: floats, or arrays with one entry a resample. A name never counted is 0."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture that is part of the question file, base64."""

    base64: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One question."""

    id: str | int  # question_id with the type the question file gives it; answers files keep it
    text: str  # what the question file holds for the model
    image: Path | Embedded | None  # None: a question of text only
    unit: str  # what the bootstrap draws, usually the image
    where: str  # file:line of the question
    category: str = ""
    stratum: str = ""  # the part within which units are drawn
    reference: Any = None  # what is right, in the benchmark's own form; None: labels not there
    stem: str = ""  # of a multiple-choice question that can be asked in rotations: `text` without the options
    options: tuple[str, ...] = ()
    key: str = ""  # what tells it from all others, where the id alone does not

    @property
    def asked(self) -> Asked:
        return Asked(self.key or str(self.id), self.id, self.text, self.where)


Unit = Sequence[tuple[Sample, str | None]]
"""The questions of one unit with their answers; None: not answered."""


# --- which question a row of an answers file answers ---


def by_id(samples: Sequence[Sample]) -> Callable[[Row], str | None]:
    return lambda row: row.id


def question_key(identifier: object, question: str) -> str:
    return f"{identifier} {' '.join(question.split())}"


def bare_question(text: str) -> str:
    """The question in a prompt: without OCR line, suffix or BLIP-style frame, blanks folded."""
    if text.startswith("OCR tokens: ") and "Question: " in text:
        return text.rpartition("Question: ")[2].partition(" Short answer:")[0]
    lines = (line.strip() for line in text.strip().removesuffix(SHORT.strip()).split("\n"))
    return " ".join(" ".join(line for line in lines if not line.startswith("Reference OCR token:")).split())


def by_id_and_question(
    samples: Sequence[Sample], fold: Callable[[str], str] = str
) -> Callable[[Row], str | None]:
    """Where ids repeat (MME, TextVQA) or mean another question in another release (POPE).

    The stored prompt names the question: what is left of it without its frame, or one of its lines. `fold`
    is what the samples' keys went through. A row without a prompt is found by an id that is unique.
    """
    known = {sample.asked.key for sample in samples}
    by_number: dict[str, set[str]] = {}
    for sample in samples:
        by_number.setdefault(str(sample.id), set()).add(sample.asked.key)

    def find(row: Row) -> str | None:
        if not row.prompt:
            keys = by_number.get(row.id, set())
            return next(iter(keys)) if len(keys) == 1 else None
        texts = (bare_question(row.prompt), *row.prompt.split("\n"))
        return next((key for text in texts if (key := question_key(row.id, fold(text))) in known), None)

    return find


# --- the benchmark itself ---


def text_as_is(sample: Sample, protocol: str = "") -> str:
    """`prompt` of a benchmark whose question file holds the whole text."""
    return sample.text


@dataclass(frozen=True)
class Protocol:
    """A way of asking; answers asked in two ways never share a file."""

    name: str
    note: str
    image_aspect_ratio: str | None = None  # replaces the checkpoint's own where the protocol is about pixels


STANDARD = Protocol(
    "llava-1.5", "as LLaVA-1.5 asks; images are padded or cropped as the checkpoint's config says"
)


@dataclass(frozen=True)
class DataFile:
    """A file or folder a benchmark needs, its path relative to playground/data/eval."""

    path: str
    rows: int | None  # questions (files, for a folder) of the official release; None: not stated here
    source: str
    purpose: str  # "ask", "score", "submit", joined by commas
    rebuild: Callable[[Path], str] | None = None  # root -> its text, made from the other files


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its facts and its four functions."""

    name: str
    title: str
    version: str
    questions: int  # of the official set
    headline: str  # the entry of `metrics` that papers quote
    files: tuple[DataFile, ...]
    load: Callable[
        ..., list[Sample]
    ]  # (root, questions=None): `questions` replaces the default question file
    prompt: Callable[..., str] = text_as_is  # (sample, protocol=default)
    measure: Callable[[Unit], Counts] | None = None
    metrics: Callable[[Totals], dict[str, Any]] | None = None
    unscored: str = ""  # what to do where there are no labels to score with
    find: Callable[[Sequence[Sample]], Callable[[Row], str | None]] = by_id
    read: Callable[[Sequence[Path]], tuple[list[Row], list[str]]] = read_answers
    from_rows: Callable[[list[Row]], list[Sample]] | None = (
        None  # the questions, where rows name them in full
    )
    write: Callable[[Path, Path, Mapping[str, str]], None] | None = (
        None  # (out, root, {id: answer}): server's file
    )
    optional: Callable[[Path, Sequence[Sample]], list[Asked]] = (
        lambda root, samples: []
    )  # may be answered as well
    protocols: tuple[Protocol, ...] = (STANDARD,)
    recorded: Callable[[Sample, str], str] = lambda sample, prompt: (
        prompt
    )  # what answers files keep as `prompt`
    max_new_tokens: int = 128
    unit: str = " %"

    def join(
        self, samples: Sequence[Sample], rows: Iterable[Row], others: Sequence[Asked] = ()
    ) -> tuple[list[Row | None], list[str]]:
        """`answers.join` of these questions; `others` may be answered but need not be."""
        return join([*(sample.asked for sample in samples), *others], rows, self.find(samples))

    def score(self, samples: Sequence[Sample], answers: Sequence[str | None]) -> dict[str, Any]:
        """{"metrics": {...}, "interval": [low, high] of the headline or None}.

        `answers` go with `samples`. None, no answer, counts nowhere: refuse it before, or say over how many
        the score is. Raises UserError where the benchmark cannot be scored here or has no labels.
        """
        if (
            self.measure is None
            or self.metrics is None
            or any(sample.reference is None for sample in samples)
        ):
            raise UserError(f"{self.name}: {self.unscored}")
        units: dict[tuple[str, str], list[tuple[Sample, str | None]]] = {}
        for sample, answer in zip(samples, answers, strict=True):
            units.setdefault((sample.stratum, sample.unit), []).append((sample, answer))
        counts = [self.measure(unit) for unit in units.values()]
        names = sorted({name for count in counts for name in count})
        table = np.array([[count.get(name, 0.0) for name in names] for count in counts]).reshape(
            len(counts), -1
        )
        strata = np.array([stratum for stratum, _ in units])
        totals = _Totals(zip(names, table.sum(0), strict=True))
        return {"metrics": _plain(self.metrics(totals)), "interval": self._interval(names, table, strata)}

    def _interval(self, names: list[str], table: np.ndarray, strata: np.ndarray) -> list[float] | None:
        draw = np.random.default_rng(0)
        totals = np.zeros((RESAMPLES, len(names)))
        for stratum in np.unique(strata):
            part = table[strata == stratum]
            for resample in range(RESAMPLES):
                drawn = draw.integers(len(part), size=len(part))
                totals[resample] += np.bincount(drawn, minlength=len(part)) @ part
        values = np.asarray(self.metrics(_Totals(zip(names, totals.T, strict=True)))[self.headline])
        values = values[np.isfinite(values)]
        return [float(bound) for bound in np.percentile(values, [2.5, 97.5])] if values.size else None


class _Totals(dict):
    def __missing__(self, name: str) -> float:
        return 0.0


def _plain(value: Any) -> Any:
    """numpy's numbers to Python's, NaN (a mean over nothing) to None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    number = float(value)
    return None if np.isnan(number) else number


# --- counting ---


def per_question(judge: Callable[[Sample, str], Counts]) -> Callable[[Unit], Counts]:
    """`measure` of a benchmark whose questions count one by one."""

    def measure(unit: Unit) -> Counts:
        counts: Counts = {}
        for sample, answer in unit:
            if answer is not None:
                for name, value in judge(sample, answer).items():
                    counts[name] = counts.get(name, 0.0) + value
        return counts

    return measure


def ratio(part: Any, whole: Any, empty: float = np.nan) -> np.ndarray:
    """part / whole, `empty` where whole is 0; scalars or arrays."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(whole.shape, empty), where=whole != 0)


def percent(part: Any, whole: Any) -> np.ndarray:
    return 100 * ratio(part, whole)


def percent_by(totals: Totals, prefix: str) -> dict[str, np.ndarray]:
    """{x: percent} of the counts named `prefix/x/right` and `prefix/x/n`."""
    names = sorted(
        name[len(prefix) + 1 : -2] for name in totals if name.startswith(prefix) and name.endswith("/n")
    )
    return {x: percent(totals[f"{prefix}/{x}/right"], totals[f"{prefix}/{x}/n"]) for x in names}


# --- reading what benchmarks ship, writing what servers take ---


class MissingFile(UserError):
    """A file of a benchmark is not there."""


def require(path: Path) -> Path:
    if not path.exists():
        raise MissingFile(
            f"{path} is missing; `llava doctor eval` says what belongs there and where it comes from."
        )
    return path


def read_json(path: Path) -> Any:
    """UserError where the file is missing or broken."""
    try:
        return json.loads(require(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error}); fetch it again.") from error


def read_rows(path: Path, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of a JSON Lines file; UserError at a row that is none or lacks one of `keys`."""
    for number, line in numbered_lines(require(path)):
        try:
            row = parse_object(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}.") from error
        for key in keys:
            if key not in row:
                raise UserError(f"{path}:{number}: there is no {key!r} in this row.")
        yield f"{path}:{number}", row


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
