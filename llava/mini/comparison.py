"""The figures of `llava mini evaluate`: accuracy with intervals, areas under the curve, tests, a plot."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from llava.files import write_json, write_text
from llava.mini.world import constant_answers

REFERENCES = ("prumerge+", "random")
"""Every reducer is tested against these where they keep as many tokens (within one: PruMerge appends one)."""

RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A number and the middle 95 % of it over scenes drawn anew (bootstrap)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {(self.high - self.low) / 2:.1f}"


@dataclass(frozen=True)
class Pair:
    """A reducer beside another that keeps as many tokens, on the same questions.

    Attributes:
        only_first: questions the first one's answer alone is right in; `only_other`: the other's alone.
    """

    first: str
    other: str
    only_first: int
    only_other: int

    @property
    def p(self) -> float:
        """Exact two-sided McNemar test: how likely so uneven a split is where neither is better."""
        n = self.only_first + self.only_other
        tail = sum(math.comb(n, k) for k in range(min(self.only_first, self.only_other) + 1))
        return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the i-th smallest of n times n - i + 1, never below a smaller one's."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def kind_of(question: dict) -> str:
    """The column of a question: its type where it is asked openly, and presence; of the others their form."""
    if question["form"] == "open" or question["type"] == "presence":
        return question["type"]
    return {"yesno": "other yes/no", "choice": "choice"}[question["form"]]


def weighted_auc(margins: np.ndarray, yes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R] areas under the ROC curve: how often a yes has a larger margin than a no, ties half.

    Args:
        margins: [n].
        yes: [n] bool.
        weights: [R, n], of the questions, a row a curve.
    """
    positive, negative = margins[yes][:, None], margins[~yes][None, :]
    above = (positive > negative) + 0.5 * (positive == negative)
    won, lost = weights[:, yes], weights[:, ~yes]
    return ((won @ above) * lost).sum(1) / (won.sum(1) * lost.sum(1))


@np.errstate(invalid="ignore")  # a resample of few scenes may lack a kind: nan, which percentiles leave out
def figures(questions: Sequence[dict], answers: Sequence[dict], draws: np.ndarray) -> dict[str, Figure]:
    """Percent right by kind and their mean, presence's area under the curve in percent, and the mean
    log-probability of open answers.

    Args:
        draws: [R, n] how often each question counts; the first row is all ones, the others are resamples.
    """
    kinds = np.array([kind_of(question) for question in questions])
    right = np.array([answer["right"] for answer in answers], float)
    logprob = np.array([answer["logprob"] for answer in answers])
    is_open = np.array([question["form"] == "open" for question in questions])
    columns: dict[str, np.ndarray] = {}
    for kind in sorted(set(kinds)):
        counts = draws[:, kinds == kind]
        columns[kind] = 100 * (counts @ right[kinds == kind]) / counts.sum(1)
    found = {"mean": np.mean(list(columns.values()), axis=0), **columns}
    presence = kinds == "presence"
    yes = np.array([question["answer"] == "Yes" for question in questions])[presence]
    margins = np.array([answer["margin"] for answer in answers])[presence]
    if yes.any() and not yes.all():
        found["presence, AUC"] = 100 * weighted_auc(margins, yes, draws[:, presence])
    if is_open.any():
        found["open, log p"] = (draws[:, is_open] @ logprob[is_open]) / draws[:, is_open].sum(1)
    known = {name: row for name, row in found.items() if not math.isnan(row[0])}
    return {name: Figure(row[0], *np.nanpercentile(row[1:], [2.5, 97.5])) for name, row in known.items()}


def resample(questions: Sequence[dict], rng: np.random.Generator) -> np.ndarray:
    """[1 + RESAMPLES, n] how often each question counts: once; then as often as its scene was drawn."""
    images = list(dict.fromkeys(question["image"] for question in questions))
    scene = np.array([images.index(question["image"]) for question in questions])
    drawn = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), size=RESAMPLES)
    return np.concatenate([np.ones((1, len(questions))), drawn[:, scene]])


def constants(questions: Sequence[dict]) -> list[dict]:
    """The answers of a model that always says the most frequent right answer of a type and form."""
    best = constant_answers(questions)
    said = [best[f"{question['type']}/{question['form']}"]["constant"] for question in questions]
    right = [question["answer"] == answer for question, answer in zip(questions, said, strict=True)]
    return [{"right": one, "logprob": math.nan, "margin": 0.0} for one in right]


def against_references(first: str, other: str) -> bool:
    return name_of(other) in REFERENCES and name_of(first) != "random" and first != other


def write_report(
    out: Path,
    questions: Sequence[dict],
    rows: Mapping[str, Mapping[str, dict]],
    tested: Callable[[str, str], bool] = against_references,
) -> None:
    """table.md, table.json and accuracy.png from the answers by reducer and image.

    Args:
        rows: of each reducer (or of what is compared, "name(tokens=N)"), by image.
        tested: whether the first is tested against the other, where both keep as many tokens.
    """
    draws = resample(questions, np.random.default_rng(0))
    answers = {
        spec: [of[question["image"]]["answers"][str(question["question_id"])] for question in questions]
        for spec, of in rows.items()
    }
    images = {question["image"] for question in questions}
    tokens = {spec: float(np.mean([of[image]["tokens"] for image in images])) for spec, of in rows.items()}
    table = {"constant answer": figures(questions, constants(questions), draws)}
    table |= {spec: figures(questions, given, draws) for spec, given in answers.items()}
    pairs = [
        Pair(first, other, *only_one_right(answers[first], answers[other]))
        for first, other in product(answers, answers)
        if tested(first, other) and abs(tokens[first] - tokens[other]) < 1.5
    ]
    corrected = holm([pair.p for pair in pairs])
    write_text(out / "table.md", as_markdown(questions, table, tokens, pairs, corrected))
    report = {
        "questions": len(questions),
        "tokens": tokens,
        "figures": {spec: {name: vars(one) for name, one in row.items()} for spec, row in table.items()},
        "pairs": [vars(pair) | {"p": pair.p, "holm": p} for pair, p in zip(pairs, corrected, strict=True)],
    }
    write_json(out / "table.json", report)
    plot(out / "accuracy.png", table, tokens)


def name_of(spec: str) -> str:
    """The method with its options but for how many tokens: one row of the table, one line of the plot."""
    return re.sub(r"(?<=\()tokens=\d+(, *)?|, *tokens=\d+", "", spec).replace("()", "")


def only_one_right(first: Sequence[dict], other: Sequence[dict]) -> tuple[int, int]:
    both = [(a["right"], b["right"]) for a, b in zip(first, other, strict=True)]
    return both.count((True, False)), both.count((False, True))


def budgets(tokens: Mapping[str, float]) -> list[int]:
    """The numbers of tokens that were tried; PruMerge keeps one more than it is asked for."""
    counts = {round(count) for count in tokens.values()}
    return sorted(count for count in counts if count - 1 not in counts)


def by_budget(
    table: Mapping[str, Mapping[str, Figure]],
    tokens: Mapping[str, float],
    pairs: Sequence[Pair],
    corrected: Sequence[float],
) -> list[str]:
    """A row a reducer, a column a number of tokens: the mean, and ▲ or ▼ where the corrected test calls it
    better or worse than the first of `REFERENCES`."""
    marks = {
        spec: "▲" if gain > 0 else "▼"
        for pair, p in zip(pairs, corrected, strict=True)
        for spec, against, gain in (
            (pair.first, pair.other, pair.only_first - pair.only_other),
            (pair.other, pair.first, pair.only_other - pair.only_first),
        )
        if name_of(against) == REFERENCES[0] and p < 0.05
    }
    columns = budgets(tokens)
    cells: dict[str, dict[int, str]] = {}
    for spec, count in tokens.items():
        column = max(budget for budget in columns if budget <= round(count))
        row = cells.setdefault(name_of(spec), {})
        if column in row:  # one that finds its number itself may find one that is there
            row = cells.setdefault(f"{name_of(spec)} at {count:.1f}", {})
        row[column] = f"{table[spec]['mean']} {marks.get(spec, '')}".strip()
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in cells.items()]
    lines = [["reducer", *map(str, columns)], ["---"] * (len(columns) + 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def as_markdown(
    questions: Sequence[dict],
    table: Mapping[str, Mapping[str, Figure]],
    tokens: Mapping[str, float],
    pairs: Sequence[Pair],
    corrected: Sequence[float],
) -> str:
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    kinds = [kind_of(question) for question in questions]
    sizes = [str(kinds.count(name)) if name in kinds else "" for name in columns]
    lines = [
        *by_budget(table, tokens, pairs, corrected),
        "",
        "| reducer | tokens | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
        "| *questions* | | " + " | ".join(sizes) + " |",
    ]
    for spec, row in table.items():
        count = f"{tokens[spec]:.1f}" if spec in tokens else ""
        lines.append(f"| {spec} | {count} | " + " | ".join(str(row.get(name, "")) for name in columns) + " |")
    lines += [
        "",
        "| reducer | against | only it is right | only the other | p | p, Holm |",
        "|---|---|---|---|---|---|",
    ]
    for pair, p in zip(pairs, corrected, strict=True):
        alone = f"{pair.only_first} | {pair.only_other}"
        lines.append(f"| {pair.first} | {pair.other} | {alone} | {pair.p:.2g} | {p:.2g} |")
    return "\n".join(lines) + "\n"


def plot(file: Path, table: Mapping[str, Mapping[str, Figure]], tokens: Mapping[str, float]) -> None:
    """Mean accuracy against visual tokens: a panel a reducer, with its intervals, in front of the others."""
    from matplotlib.figure import Figure as Canvas

    curves: dict[str, list[str]] = {}
    for spec in sorted(tokens, key=tokens.__getitem__):
        curves.setdefault(name_of(spec), []).append(spec)
    # In the order of the table. `none` has one count: it is a point in every panel.
    names = list(dict.fromkeys(map(name_of, tokens)))
    lines = [name for name in names if len(curves[name]) > 1] or names
    wide = min(5, len(lines))
    high = -(-len(lines) // wide)
    canvas = Canvas(figsize=(2.3 * wide + 0.5, 2 * high + 0.9), layout="constrained")
    panels = canvas.subplots(high, wide, sharex=True, sharey=True, squeeze=False).flatten()
    ticks = budgets(tokens)
    dashes = dict(zip(REFERENCES, ("--", ":"), strict=True))
    for place, (axes, name) in enumerate(zip(panels, lines, strict=False)):
        for other in names:
            x, y = zip(*((tokens[spec], table[spec]["mean"].value) for spec in curves[other]), strict=True)
            look = {"linewidth": 1, "markersize": 4, "marker": "s" if len(x) == 1 else ""}
            if other in dashes or other not in lines:
                axes.plot(x, y, color="black", linestyle=dashes.get(other, "-"), label=other, **look)
            else:
                axes.plot(x, y, color="0.85", zorder=0, **look)
        x, means = zip(*((tokens[spec], table[spec]["mean"]) for spec in curves[name]), strict=True)
        axes.fill_between(x, [one.low for one in means], [one.high for one in means], alpha=0.25, linewidth=0)
        axes.plot(x, [one.value for one in means], "o-", color="C0", markersize=4)
        axes.axhline(table["constant answer"]["mean"].value, color="C3", linewidth=1, label="constant answer")
        axes.set_title(name, fontsize="medium")
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize="small")
        axes.minorticks_off()
        axes.tick_params(labelbottom=place + wide >= len(lines))
    for axes in panels[len(lines) :]:
        axes.set_axis_off()
    canvas.supxlabel("visual tokens", fontsize="medium")
    canvas.supylabel("percent right, mean over kinds", fontsize="medium")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    canvas.savefig(file, dpi=110)
