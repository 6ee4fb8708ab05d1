"""`llava plot RUN ...`: loss, learning rate and throughput of training runs, as one PNG. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llava.errors import UserError

LOG_FILE = "log.jsonl"
SMOOTHING = 0.9

PANELS: tuple[tuple[str, str], ...] = (
    # key of a log line, label of the axis
    ("loss", "loss"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("samples_per_second", "samples / s"),
    ("visual_tokens_per_image", "visual tokens / image"),
    ("visual_tokens_per_second", "visual tokens / s"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run, or its log.jsonl"
    )
    parser.add_argument("--out", type=Path, help="picture to write (default: RUN/log.png of the first run)")


def run(args: argparse.Namespace) -> int:
    logs = {path: load(path) for path in args.runs}
    first = args.runs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "log.png"
    draw(logs, out)
    print(out)
    return 0


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a line cut short by a kill is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def load(path: Path) -> list[dict[str, Any]]:
    """The log lines of a run that carry a loss, in order of their step.

    Raises:
        UserError: no log there, or none of its lines has a loss yet.
    """
    file = path / LOG_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no {file}: give the --output_dir of a training run.")
    rows = [row for row in read_log(file) if "loss" in row]
    if not rows:
        raise UserError(f"{file} has no line with a loss yet.")
    return sorted(rows, key=lambda row: row["step"])


def running_mean(values: list[float]) -> list[float]:
    """Exponential mean without the bias of its start: each value weighs `SMOOTHING` times the next one."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        means.append(total / weight)
    return means


def draw(logs: dict[Path, list[dict[str, Any]]], out: Path) -> None:
    """One panel per quantity that any run has logged, one colour per run."""
    from matplotlib.figure import Figure

    panels = [
        (key, label) for key, label in PANELS if any(key in row for rows in logs.values() for row in rows)
    ]
    figure = Figure(figsize=(11, 3 * ((len(panels) + 1) // 2)), layout="constrained")
    axes = list(figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat)
    for (key, label), axis in zip(panels, axes, strict=False):
        for number, (path, rows) in enumerate(logs.items()):
            points = [(row["step"], row[key]) for row in rows if key in row]
            steps, values = [step for step, _ in points], [value for _, value in points]
            color = f"C{number}"
            if key == "loss":
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                values = running_mean(values)
            axis.plot(steps, values, color=color, linewidth=1.2, label=path.name)
        axis.set(xlabel="step", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    if len(logs) > 1:
        axes[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
