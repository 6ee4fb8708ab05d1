"""What every benchmark shares: a question, the labels it is scored with, and a score with its interval.

A benchmark is one file of this folder that fills a `Benchmark`: `load` reads the official files, `prompt`
says what the model is asked, `measure` counts over the questions of one image, `metrics` turns the sums of
these counts into the figures papers print. Nothing here needs torch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llava.errors import UserError
from llava.eval.answers import Row, join, read_answers
from llava.eval.reading import read_rows

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHER_RELEASE = "questions and labels are of different releases or splits"
RESAMPLES = 1000
BUNDLE = "LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"

PUBLISHED_MODELS: dict[str, int] = {
    # Whose scores `Benchmark.published` lists, in this order, and their visual tokens an image. From the
    # LLaVA-1.5 paper and model zoo and the PruMerge paper. They differ in ways that matter: LLaVA's ScienceQA
    # was made without padding (69.5 with), PruMerge's models are LoRA-tuned with their reducer, and libraries
    # move results by up to 0.4 points (MME by about 5).
    "LLaVA-1.5-7B": 576,
    "LLaVA-1.5-7B LoRA": 576,
    "LLaVA-1.5-7B, a third party's rerun of the present code": 576,
    "LLaVA-1.5-7B that sees nothing (third party)": 0,
    "LLaVA-1.5-13B": 576,
    "PruMerge 7B": 32,
    "PruMerge+ 7B": 144,
    "PruMerge 13B": 32,
    "PruMerge+ 13B": 144,
}


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
    reference: Any = None  # what is right, in the benchmark's own form; None: labels not there
    stem: str = ""  # of a multiple-choice question that can be asked in rotations: `text` without the options
    options: tuple[str, ...] = ()
    key: str = ""  # what tells it from all others: the id, unless the benchmark has its own `key`

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or str(self.id))

    @property
    def label(self) -> str:
        """How a person recognises it."""
        return f"{self.id} ({' '.join(self.text.split())[:60]!r})"


# --- how questions are told apart ---


def by_id(identifier: object, text: str) -> str:
    return str(identifier)


def by_id_and_question(identifier: object, text: str) -> str:
    """Where ids repeat (MME, TextVQA) or mean another question in another release (POPE)."""
    return f"{identifier} {bare_question(text)}"


def bare_question(text: str) -> str:
    """The question in a prompt: without OCR line, suffix or BLIP-style frame, blanks folded."""
    if text.startswith("OCR tokens: ") and "Question: " in text:
        return text.rpartition("Question: ")[2].partition(" Short answer:")[0]
    lines = (line.strip() for line in text.strip().removesuffix(SHORT.strip()).split("\n"))
    return " ".join(" ".join(line for line in lines if not line.startswith("Reference OCR token:")).split())


# --- questions and labels ---


class Question(msgspec.Struct):
    """A row of LLaVA's question files."""

    question_id: int | str
    image: str | None  # None: a question of text only
    text: str
    category: Any = "default"


def read_questions(file: Path) -> Iterator[tuple[str, Question]]:
    """(file:line, row) of a question file."""
    return read_rows(file, Question)


def samples_of(
    rows: Iterable[tuple[str, Question]], images: Path, key: Callable[[object, str], str] = by_id
) -> list[Sample]:
    """(file:line, row) of a question file as samples without reference."""
    return [
        Sample(
            row.question_id,
            row.text,
            None if row.image is None else images / row.image,
            unit=str(row.question_id) if row.image is None else row.image,
            where=where,
            key=key(row.question_id, row.text),
        )
        for where, row in rows
    ]


def labelled_questions(
    file: Path,
    images: Path,
    made: Sequence[tuple[str, Question, Any]] | None,
    source: Path,
    *,
    whole: bool,
    key: Callable[[object, str], str] = by_id,
    read: Callable[[Path], Iterable[tuple[str, Question]]] = read_questions,
) -> list[Sample]:
    """The questions of `file` with their labels, for benchmarks whose labels determine the question file.

    Args:
        made: (file:line, row of the question file, label) of each label in `source`; None: they are not
            there, and the samples have no reference. Their rows are the questions where `file` is missing.
        whole: every label must have its question.
    """
    if made is None:
        return samples_of(read(file), images, key)
    known = samples_of_labels(made, images, key)
    if not file.exists():
        return known
    labels = [(sample.key, sample.reference) for sample in known]
    return with_labels(samples_of(read(file), images, key), labels, source, whole=whole)


def samples_of_labels(
    made: Sequence[tuple[str, Question, Any]], images: Path, key: Callable[[object, str], str] = by_id
) -> list[Sample]:
    """(file:line, row of the question file, label) of each label as samples."""
    samples = samples_of([(where, row) for where, row, _ in made], images, key)
    return [replace(sample, reference=label) for sample, (_, _, label) in zip(samples, made, strict=True)]


def with_labels(
    samples: Sequence[Sample], labels: Iterable[tuple[str, Any]], source: Path, *, whole: bool
) -> list[Sample]:
    """The samples, each with its `reference` from `labels`, (key, reference) pairs.

    Equal keys go together in their order. Raises UserError where a question has no label in `source` and,
    with `whole`, where a label has no question.
    """
    unused: dict[str, list[Any]] = {}
    for key, reference in labels:
        unused.setdefault(key, []).append(reference)
    labelled = []
    for sample in samples:
        if not unused.get(sample.key):
            raise UserError(
                f"{sample.where}: question {sample.label} has no label in {source}; {OTHER_RELEASE}."
            )
        labelled.append(replace(sample, reference=unused[sample.key].pop(0)))
    left = [key for key, references in unused.items() if references]
    if whole and left:
        raise UserError(
            f"{source}: {len(left):,} labels belong to no question, the first: {left[0]}; {OTHER_RELEASE}."
        )
    return labelled


# --- the benchmark itself ---


def text_as_is(sample: Sample, protocol: str = "") -> str:
    """`prompt` of a benchmark whose question file holds the whole text."""
    return sample.text


def text_and_letter(sample: Sample, protocol: str = "") -> str:
    return sample.text + LETTER


Counts = Mapping[str, Any]
"""Counts by name: those of one unit; their sums; or arrays of sums with one entry a resample. A name that was
never counted is 0 in the sums."""
Unit = Sequence[tuple[Sample, str | None]]
"""The questions of one image with their answers; None: not answered."""


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
    """One benchmark: its facts and its functions."""

    name: str
    title: str
    version: str
    questions: int  # of the official set
    headline: str  # the entry of `metrics` that papers quote
    files: tuple[DataFile, ...]
    load: Callable[..., list[Sample]]  # (root, questions=None); `questions` replaces the question file
    # (sample, protocol): what the model is asked, without the image tag
    prompt: Callable[..., str] = text_as_is
    measure: Callable[[Unit], Counts] | None = None  # None: it is not scored here
    metrics: Callable[[Counts], dict[str, Any]] = lambda sums: {"accuracy": percent(sums)}
    unscored: str = ""  # what to do where there are no labels to score with
    key: Callable[[object, str], str] = by_id  # (id, prompt): the `key` of a sample and of its answer
    within_category: bool = False  # the bootstrap draws within each category: the score is a sum over them
    read: Callable[[Sequence[Path]], tuple[list[Row], list[str]]] = read_answers
    # The questions, where rows of the answers name them in full.
    from_rows: Callable[[list[Row]], list[Sample]] | None = None
    # (out, root, {id: answer}): writes the server's file.
    write: Callable[[Path, Path, Mapping[str, str]], None] | None = None
    # (root, samples): questions that may be answered as well.
    optional: Callable[[Path, Sequence[Sample]], list[Sample]] = lambda root, samples: []
    protocols: tuple[Protocol, ...] = (STANDARD,)
    recorded: Callable[[Sample, str], str] = lambda sample, prompt: prompt  # `prompt` of answers files
    max_new_tokens: int = 128
    unit: str = " %"
    published: tuple[float | None, ...] = ()  # scores of PUBLISHED_MODELS

    def join(
        self, samples: Sequence[Sample], rows: Iterable[Row], others: Sequence[Sample] = ()
    ) -> tuple[list[Row | None], list[str]]:
        """`answers.join` by `key`: of the stored prompt as a whole or of one of its lines.

        A row without a prompt is found by an id that only one question has.
        """
        known: set[str] = set()
        keys_of: dict[str, set[str]] = {}
        for sample in (*samples, *others):
            known.add(sample.key)
            keys_of.setdefault(str(sample.id), set()).add(sample.key)

        def find(row: Row) -> str | None:
            texts = (row.prompt, *row.prompt.split("\n"))
            found = next((key for text in texts if (key := self.key(row.id, text)) in known), None)
            same_id = keys_of.get(row.id, ())
            return next(iter(same_id)) if not row.prompt and len(same_id) == 1 else found

        return join(samples, rows, find, others)

    def score(self, samples: Sequence[Sample], answers: Sequence[str | None]) -> dict[str, Any]:
        """{"metrics": {...}, "interval": [low, high] of the headline or None}.

        `answers` go with `samples`. None, no answer, counts nowhere: refuse it before, or say over how many
        the score is. Raises UserError where the benchmark cannot be scored here or has no labels.
        """
        if self.measure is None or any(sample.reference is None for sample in samples):
            raise UserError(f"{self.name}: {self.unscored}")
        units: dict[tuple[str, str], list[tuple[Sample, str | None]]] = {}
        for sample, answer in zip(samples, answers, strict=True):
            stratum = sample.category if self.within_category else ""
            units.setdefault((stratum, sample.unit), []).append((sample, answer))
        counts = [self.measure(unit) for unit in units.values()]
        names = sorted(set().union(*counts))
        per_unit = np.array([[float(one.get(name, 0)) for name in names] for one in counts])
        per_unit = per_unit.reshape(len(counts), len(names))
        drawn = bootstrap_sums(per_unit, np.array([stratum for stratum, _ in units]))
        metrics, resampled = (
            self.metrics(defaultdict(float, zip(names, sums, strict=True)))
            for sums in (per_unit.sum(0), drawn.T)
        )
        headline = np.asarray(resampled[self.headline])
        headline = headline[np.isfinite(headline)]
        interval = [float(bound) for bound in np.percentile(headline, [2.5, 97.5])] if headline.size else None
        return {"metrics": _plain(metrics), "interval": interval}


def bootstrap_sums(per_unit: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Sums [RESAMPLES, counts] over units drawn with replacement from `per_unit` [units, counts].

    Units, not questions: those of one image go wrong together. Drawn within each stratum, where a score is a
    sum over fixed parts.
    """
    draw = np.random.default_rng(0)
    sums = np.zeros((RESAMPLES, per_unit.shape[1]))
    for stratum in np.unique(strata):
        part = per_unit[strata == stratum]
        for resample in range(RESAMPLES):
            drawn = draw.integers(len(part), size=len(part))
            sums[resample] += np.bincount(drawn, minlength=len(part)) @ part
    return sums


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
        counts: dict[str, float] = {}
        for sample, answer in unit:
            if answer is not None:
                for name, value in judge(sample, answer).items():
                    counts[name] = counts.get(name, 0.0) + value
        return counts

    return measure


def tally(right: float, *groups: str) -> dict[str, float]:
    """Counts of one question that is `right` (0 to 1), in "all" and in `groups`, for `percent`."""
    return {
        f"{group}/{name}": value for group in ("all", *groups) for name, value in (("right", right), ("n", 1))
    }


def ratio(part: Any, whole: Any, empty: float = np.nan) -> np.ndarray:
    """part / whole, `empty` where whole is 0; scalars or arrays."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(whole.shape, empty), where=whole != 0)


def percent(sums: Counts, group: str = "all") -> np.ndarray:
    """How many of a group are right."""
    return 100 * ratio(sums[f"{group}/right"], sums[f"{group}/n"])


def percent_by(sums: Counts, prefix: str) -> dict[str, np.ndarray]:
    """{x: percent} of the groups named `prefix/x`."""
    groups = sorted(
        name[: -len("/n")] for name in sums if name.startswith(f"{prefix}/") and name.endswith("/n")
    )
    return {group[len(prefix) + 1 :]: percent(sums, group) for group in groups}
