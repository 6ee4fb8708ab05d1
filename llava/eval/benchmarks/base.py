"""What every benchmark declares, and how it is scored from that, with an interval.

A benchmark is one file of this folder that fills a `Benchmark`: `load` reads the official files, `prompt`
says what the model is asked, `measure` counts over the questions of one image, `metrics` turns the sums of
these counts into the figures papers print. Nothing here needs torch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UserError
from llava.eval.answers import Row, join, read_answers
from llava.eval.questions import LETTER as LETTER
from llava.eval.questions import SHORT as SHORT
from llava.eval.questions import Sample, by_id
from llava.eval.reading import MissingFile as MissingFile

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
    prompt: Callable[..., str] = lambda sample, protocol="": sample.text
    measure: Callable[[Unit], Counts] | None = None  # None: it is not scored here
    metrics: Callable[[Counts], dict[str, Any]] = lambda sums: {"accuracy": percent(sums)}
    unscored: str = ""  # what to do where there are no labels to score with
    key: Callable[[object, str], str] = by_id  # (id, prompt): the `key` of a sample and of its answer
    within_category: bool = False  # the bootstrap draws within each category: the score is a sum over them
    read: Callable[[Sequence[Path]], tuple[list[Row], list[str]]] = read_answers
    # The questions, where rows of the answers name them in full.
    from_rows: Callable[[list[Row]], list[Sample]] | None = None
    # (out, root, {id: answer}): writes the server's file. Some take their question file after these.
    write: Callable[..., None] | None = None
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
