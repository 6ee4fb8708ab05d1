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
from typing import TYPE_CHECKING, Any

from llava.errors import UserError
from llava.eval import benchmarks, provenance
from llava.eval.benchmarks.base import PUBLISHED_MODELS
from llava.eval.reading import read_json
from llava.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    def name(self) -> str:
        return f"{self.model}, {self.reducer}, {self.dtype}"

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
    made = provenance.read_run(file)
    content = read_json(file)
    took, score = content.get("summary"), content.get("score", {})
    if took is None or "benchmark" not in made:
        return None
    headline, tokens = score.get("headline") or {}, took["visual_tokens"] or {}
    speed = took["questions_per_second"]
    interval = headline.get("interval")
    return Run(
        file=str(file),
        **{name: made[name] for name in ("benchmark", "protocol", "model", "weights", "reducer", "dtype")},
        score=headline.get("value"),
        interval=interval and tuple(interval),
        partial=score.get("partial", False),
        questions=took["questions"],
        answered=took["answered"],
        visual_tokens=tokens.get("mean"),
        visual_tokens_p95=tokens.get("p95"),
        seconds_per_question=1 / speed if speed else None,
        device=", ".join(sorted({str(one.get("device")) for one in content["sessions"]})),
    )


def published() -> list[dict[str, Any]]:
    """Scores others published: name, visual tokens an image, and {benchmark: score}."""
    rows = []
    for place, (name, visual_tokens) in enumerate(PUBLISHED_MODELS.items()):
        known = {
            x.name: x.published[place] for x in benchmarks.BENCHMARKS.values() if place < len(x.published)
        }
        scores = {benchmark: score for benchmark, score in known.items() if score is not None}
        rows.append({"name": name, "visual_tokens": visual_tokens, "scores": scores})
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

STYLE = "body{font-family:sans-serif}td{padding:.3em .7em;white-space:nowrap}tr:first-child{font-weight:bold}"


def as_html(runs: Sequence[Run]) -> str:
    body = []
    for title, header, rows in tables(runs):
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in (header, *rows)]
        body.append(f"<h2>{html.escape(title)}</h2><table><tr>{'<tr>'.join(lines)}</table>")
    scored = [one for one in runs if one.score is not None]
    if scored:
        out = io.StringIO()
        plot(scored).savefig(out, format="svg", metadata={"Date": None})
        body.append(out.getvalue()[out.getvalue().index("<svg") :])
    head = f'<meta charset="utf-8"><title>llava report</title><style>{STYLE}</style>'
    return f"<!doctype html>{head}<h1>Evaluation</h1>{''.join(body)}\n"


def plot(runs: Sequence[Run]) -> "Figure":
    """Of runs with a score: a row per benchmark, the score against mean visual tokens (beside the published
    ones, crosses) and against time a question. A run has one colour in all of them."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = sorted({one.column for one in runs})
    names = list(dict.fromkeys(one.name for one in runs))
    palette = matplotlib.colormaps["turbo"].resampled(len(names))
    figure = Figure(figsize=(13, 4 * len(columns)), layout="constrained")
    rows = figure.subplots(len(columns), 2, sharey="row", squeeze=False)
    legend = dict[str, Any]()
    for column, (left, right) in zip(columns, rows, strict=True):
        of_it = [one for one in runs if one.column == column]
        for one in of_it:
            low, high = one.interval or (one.score, one.score)
            error = [[one.score - low], [high - one.score]]
            for axes, x in ((left, one.visual_tokens), (right, one.seconds_per_question)):
                if x is not None:
                    color = palette(names.index(one.name))
                    legend[one.name] = axes.errorbar(x, one.score, error, fmt="o", color=color, capsize=3)
        benchmark = benchmarks.get(of_it[0].benchmark)
        if of_it[0].questions == benchmark.questions:  # published scores are those of the whole set
            for other in published():
                if benchmark.name in other["scores"]:
                    place = other["visual_tokens"], other["scores"][benchmark.name]
                    (legend["published"],) = left.plot(*place, "x", color="gray")
        left.set(ylabel=f"{column}: {benchmark.headline}{benchmark.unit}", xlabel="visual tokens an image")
        right.set(xlabel="seconds a question")
        for axes in (left, right):  # from 0, where the runs that see nothing stand
            axes.set_xlim(left=-0.03 * axes.get_xlim()[1])
            axes.grid(alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8)
    return figure
