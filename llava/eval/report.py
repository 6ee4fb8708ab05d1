"""`llava report DIR ...`: one table of all runs under some folders, beside the published numbers.

Reads the provenance files that `llava eval` leaves beside its answers. Markdown goes to stdout; `--html`
writes a page with plots of score against visual tokens and against time, `--json` the numbers.
"""

import argparse
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.benchmarks.base import PUBLISHED_MODELS
from llava.eval.reading import read_json
from llava.files import write_text


class Made(msgspec.Struct):
    """What made the answers, as the provenance file has it."""

    model: str
    weights: str
    reducer: str
    dtype: str
    benchmark: str = ""  # "": the questions were no benchmark's
    protocol: str = ""


class Summary(msgspec.Struct):
    """What the run took."""

    questions: int
    answered: int
    visual_tokens: dict[str, float] | None = None  # mean, p95 ...
    questions_per_second: float | None = None


class Headline(msgspec.Struct):
    value: float
    interval: tuple[float, float] | None = None


class Score(msgspec.Struct):
    headline: Headline | None = None
    partial: bool = False


class Provenance(msgspec.Struct):
    run: Made
    summary: Summary | None = None  # None: the run has not come to its end
    score: Score = msgspec.field(default_factory=Score)
    sittings: list[dict[str, Any]] = msgspec.field(default_factory=list)  # each with its device


@dataclass(frozen=True)
class Run:
    """One run of a benchmark."""

    file: str
    benchmark: str
    protocol: str
    model: str
    weights: str
    reducer: str
    dtype: str
    score: float | None  # the headline; None where it was not scored here
    interval: tuple[float, float] | None
    partial: bool  # only a part of the benchmark was asked
    questions: int
    answered: int
    visual_tokens: float | None  # mean over images
    visual_tokens_p95: float | None
    seconds_per_question: float | None
    device: str

    @property
    def column(self) -> str:
        """The benchmark, with its protocol where that is not the default one."""
        default = benchmarks.get(self.benchmark).protocols[0].name
        return self.benchmark if self.protocol == default else f"{self.benchmark} ({self.protocol})"

    @property
    def row(self) -> tuple[str, str, str, str]:
        return self.model, self.weights, self.reducer, self.dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched for *.provenance.json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def run(args: argparse.Namespace) -> int:
    runs = collect(args.folders)
    print(as_markdown(runs))
    if args.json:
        content = {"runs": [asdict(one) for one in runs], "published": published()}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    if args.html:
        write_text(args.html, as_html(runs))
    return 0


def collect(folders: Sequence[Path]) -> list[Run]:
    """All runs of benchmarks, of each kind the newest. UserError where there is none."""
    files = {file for folder in folders for file in folder.rglob("*.provenance.json")}
    newest: dict[tuple[object, ...], Run] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, str(file))):
        one = read_run(file)
        if one is not None:
            newest[(*one.row, one.column)] = one
    if not newest:
        raise UserError(f"no *.provenance.json of a finished run under {', '.join(map(str, folders))}.")
    return sorted(newest.values(), key=lambda one: (one.row, one.column))


def read_run(file: Path) -> Run | None:
    """None for a run that is no benchmark's or has not come to its end."""
    content = read_json(file, Provenance)
    took, headline = content.summary, content.score.headline
    if took is None or not content.run.benchmark:
        return None
    tokens, speed = took.visual_tokens or {}, took.questions_per_second
    return Run(
        file=str(file),
        **msgspec.structs.asdict(content.run),
        score=headline and headline.value,
        interval=headline and headline.interval,
        partial=content.score.partial,
        questions=took.questions,
        answered=took.answered,
        visual_tokens=tokens.get("mean"),
        visual_tokens_p95=tokens.get("p95"),
        seconds_per_question=1 / speed if speed else None,
        device=", ".join(sorted({str(one.get("device")) for one in content.sittings})),
    )


def published() -> list[dict[str, Any]]:
    """Scores others published: name, visual tokens an image, and {benchmark: score}."""
    rows = []
    for place, (name, visual_tokens) in enumerate(PUBLISHED_MODELS.items()):
        scores = {one.name: one.published[place : place + 1] for one in benchmarks.BENCHMARKS.values()}
        known = {benchmark: one[0] for benchmark, one in scores.items() if one and one[0] is not None}
        rows.append({"name": name, "visual_tokens": visual_tokens, "scores": known})
    return rows


# --- tables ---


def tables(runs: Sequence[Run]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the scores, of what they took, and of the published numbers."""
    columns = sorted({one.column for one in runs})
    rows = list(dict.fromkeys(one.row for one in runs))
    cells = {(one.row, one.column): one for one in runs}
    several = len({row[:2] for row in rows}) > len({row[0] for row in rows})  # equal names, other weights

    def label(row: tuple[str, str, str, str]) -> list[str]:
        model, weights, reducer, dtype = row
        return [f"{model} ({weights[:6]})" if several else model, reducer, dtype]

    head = ["model", "reducer", "dtype"]
    scores = [[*label(row), *(_score(cells.get((row, column))) for column in columns)] for row in rows]
    took = [[*label(row), *(_took(cells.get((row, column))) for column in columns)] for row in rows]
    names = sorted({one.benchmark for one in runs})
    others = [
        [one["name"], str(one["visual_tokens"]), *(_number(one["scores"].get(name), 1) for name in names)]
        for one in published()
    ]
    return [
        ("Scores (95 % interval)", [*head, *columns], scores),
        ("Visual tokens an image (95th percentile), seconds a question", [*head, *columns], took),
        ("Published", ["model", "tokens", *names], others),
    ]


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _score(one: Run | None) -> str:
    if one is None or one.score is None:
        return "-"
    interval = f" ({one.interval[0]:.1f} to {one.interval[1]:.1f})" if one.interval else ""
    missing = f", {one.answered:,} of {one.questions:,}" if one.answered < one.questions else ""
    part = f", a part: {one.questions:,} questions" if one.partial else ""
    return f"{one.score:.1f}{interval}{missing}{part}"


def _took(one: Run | None) -> str:
    if one is None:
        return "-"
    tokens = f"{_number(one.visual_tokens, 1)} ({_number(one.visual_tokens_p95, 0)})"
    return f"{tokens}, {_number(one.seconds_per_question, 3)} s"


def as_markdown(runs: Sequence[Run]) -> str:
    parts = []
    for title, header, rows in tables(runs):
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        parts += [f"## {title}", "", *lines, ""]
    return "\n".join(parts).rstrip()


# --- the page ---

MARKERS = "osD^v"
"""One for every ten colours."""
OTHERS = "published (table above)"

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;margin:1rem 0}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}"
    "svg{max-width:100%;height:auto}"
)


def as_html(runs: Sequence[Run]) -> str:
    body = []
    for title, header, rows in tables(runs):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        body += [f"<h2>{html.escape(title)}</h2>", f"<table><tr>{head}</tr>"]
        body += [f"<tr>{line}</tr>" for line in lines] + ["</table>"]
    names = list(dict.fromkeys(map(name_of, runs)))
    for column in sorted({one.column for one in runs if one.score is not None}):
        body += [f"<h2>{html.escape(column)}</h2>", plot([x for x in runs if x.column == column], names)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>llava report</title>'
        f"<style>{STYLE}</style></head><body><h1>Evaluation</h1>{''.join(body)}</body></html>\n"
    )


def name_of(one: Run) -> str:
    """What a legend says."""
    return f"{one.model}, {one.reducer}, {one.dtype}"


def plot(runs: Sequence[Run], names: Sequence[str]) -> str:
    """An SVG: score against mean visual tokens (published ones as crosses) and against time a question.

    `names` of all runs of the page, so that each has the same colour in every plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, quantity, label in (
        (left, "visual_tokens", "visual tokens an image"),
        (right, "seconds_per_question", "seconds a question"),
    ):
        for one in runs:
            x = getattr(one, quantity)
            if x is None or one.score is None:
                continue
            low, high = one.interval or (one.score, one.score)
            number = names.index(name_of(one))
            axes.errorbar(
                x,
                one.score,
                [[one.score - low], [high - one.score]],
                fmt=MARKERS[number // 10 % len(MARKERS)],
                color=f"C{number % 10}",
                capsize=3,
                label=names[number],
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    benchmark = benchmarks.get(runs[0].benchmark)
    if runs[0].questions == benchmark.questions:  # published scores belong beside those of the same set only
        for one in published():
            if benchmark.name in one["scores"]:
                place = one["visual_tokens"], one["scores"][benchmark.name]
                left.plot(*place, "x", color="gray", label=OTHERS)
    for axes in (left, right):  # from 0, where the runs that see nothing stand
        axes.set_xlim(left=-0.03 * axes.get_xlim()[1])
    left.set_ylabel(f"{benchmark.headline}{benchmark.unit}")
    handles, labels = left.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    shown = [label for label in (*names, OTHERS) if label in once]
    figure.legend([once[label] for label in shown], shown, loc="outside right upper", fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
