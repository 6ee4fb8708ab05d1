"""`llava mini evaluate`: accuracy by type of question and by reducer, on scenes the model never saw.

The questions of a world (`llava mini world --split test`) are asked one by one, by the same predict loop as
the benchmarks, once for every reducer; random and topk get as many tokens as prumerge kept on average. Beside
every number stands the constant answer: the most frequent right one, what a blind model could say.
Answers files in OUT resume; OUT/table.md and OUT/table.json hold the outcome.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.errors import UserError
from llava.files import read_json, write_json, write_text

REDUCERS = ("none", "prumerge+", "prumerge+(max_tokens=144)", "prumerge", "random", "topk")
SAME_COUNT_AS = "prumerge"
"""Reducers that need a count and come without one keep as many tokens as this one did on average."""
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Cell:
    """One reducer on one kind of question: how many were right, of how many."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def margin(self) -> float:
        """Half of the 95 % interval (normal approximation of the Wilson score, as a fraction)."""
        z, p, n = 1.96, self.accuracy, self.n
        return z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)


@dataclass(frozen=True)
class Kind:
    """One kind of question ("naming/open"): its size, its constant answer, and a cell per reducer."""

    name: str
    n: int
    constant: str
    share: float
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Pair:
    """PruMerge beside another selection of as many tokens, on the same questions.

    Attributes:
        only_first: questions PruMerge's answer alone is right in; `only_other`: the other's alone.
    """

    kind: str
    other: str
    n: int
    only_first: int
    only_other: int

    @property
    def p(self) -> float:
        """Exact two-sided McNemar test: how likely so uneven a split is where neither is better."""
        n = self.only_first + self.only_other
        tail = sum(math.comb(n, k) for k in range(min(self.only_first, self.only_other) + 1))
        return min(1.0, 2 * tail / 2**n)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", default="checkpoints/mini-lora")
    parser.add_argument("--model-base", default="checkpoints/mini-base")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder made by `llava mini world --split test`"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for answers and table")
    parser.add_argument("--reducers", nargs="+", default=list(REDUCERS), metavar="SPEC")
    parser.add_argument("--scenes", type=int, default=None, help="only the first so many scenes")
    parser.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")


def run(args: argparse.Namespace) -> int:
    from llava.engine import ModelSource, Request
    from llava.eval.loop import Job, answer
    from llava.eval.run import with_image

    questions = read_questions(args.data, args.scenes)
    requests = [
        Request(id=i, **with_image(q["text"], args.data / q["image"]), max_new_tokens=MAX_NEW_TOKENS, seed=0)
        for i, q in enumerate(questions)
    ]
    lines = [{"question_id": q["question_id"], "prompt": q["text"], "text": ""} for q in questions]
    tokens: dict[str, float] = {}
    right: dict[str, list[bool]] = {}
    for reducer in args.reducers:
        spec = with_count(reducer, tokens)
        file = args.out / f"{re.sub(r'[^A-Za-z0-9=.]+', '-', spec.replace('+', '-plus')).strip('-')}.jsonl"
        source = ModelSource(
            args.model_path, args.model_base, conv_mode="smollm2", reducer=spec, device=args.device
        )
        took = answer(Job(requests, lines, source, answers=file, about={}))
        tokens[spec] = took["visual_tokens"]["mean"]
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        said = {row["question_id"]: plain(row["text"]) for row in rows}
        right[spec] = [said[q["question_id"]] == plain(q["answer"]) for q in questions]
    kinds, pairs = tabulate(questions, right), compare(questions, right)
    manifest = read_json(args.data / "world.json")
    text = as_markdown(kinds, tokens, pairs, manifest)
    report = {
        "tokens": tokens,
        "kinds": [asdict(kind) for kind in kinds],
        "pairs": [asdict(pair) for pair in pairs],
        "held_out": manifest["held_out"],
    }
    write_json(args.out / "table.json", report)
    write_text(args.out / "table.md", text)
    print(text, end="")
    return 0


def read_questions(folder: Path, scenes: int | None) -> list[dict]:
    """The rows of questions.jsonl, those of the first `scenes` pictures."""
    index = folder / "questions.jsonl"
    if not index.is_file():
        raise UserError(
            f"{index} is missing; `llava mini world --split test --n 400 --seed 1 --out {folder}` makes it."
        )
    rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
    chosen = set(list(dict.fromkeys(row["image"] for row in rows))[:scenes])
    return [row for row in rows if row["image"] in chosen]


def with_count(reducer: str, tokens: dict[str, float]) -> str:
    """`random` -> `random(tokens=72)` once prumerge's mean is known; other specs as they are."""
    if reducer not in ("random", "topk", "grid", "pool"):
        return reducer
    if SAME_COUNT_AS not in tokens:
        raise UserError(
            f"{reducer} needs a count: write {reducer}(tokens=N), or name {SAME_COUNT_AS} before it."
        )
    return f"{reducer}(tokens={round(tokens[SAME_COUNT_AS])})"


def plain(answer: str) -> str:
    return answer.strip().strip(".").strip().lower()


def by_kind(questions: Sequence[dict]) -> dict[str, list[int]]:
    """Places of the questions of each type and form ("naming/open"), in alphabetical order."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(questions):
        groups.setdefault(f"{row['type']}/{row['form']}", []).append(place)
    return dict(sorted(groups.items()))


def tabulate(questions: Sequence[dict], right: dict[str, list[bool]]) -> list[Kind]:
    """One row per type and form of question. `right`: by reducer, whether each question's answer is."""
    kinds = []
    for name, places in by_kind(questions).items():
        n = len(places)
        constant, hits = Counter(plain(questions[i]["answer"]) for i in places).most_common(1)[0]
        cells = {spec: Cell(sum(flags[i] for i in places), n) for spec, flags in right.items()}
        kinds.append(Kind(name, n, constant, hits / n, cells))
    return kinds


def compare(questions: Sequence[dict], right: dict[str, list[bool]]) -> list[Pair]:
    """PruMerge beside `random` and `topk`, kind by kind; only kinds with 20 questions or more."""
    others = [spec for spec in right if spec.startswith(("random", "topk"))]
    pairs = []
    for kind, places in by_kind(questions).items():
        for other in others if SAME_COUNT_AS in right and len(places) >= 20 else ():
            both = [(right[SAME_COUNT_AS][i], right[other][i]) for i in places]
            pairs.append(Pair(kind, other, len(places), both.count((True, False)), both.count((False, True))))
    return pairs


def as_markdown(
    kinds: Sequence[Kind], tokens: dict[str, float], pairs: Sequence[Pair], manifest: dict
) -> str:
    """The table, percent right +- half of the 95 % interval; the pairs; and what was held out."""
    specs = list(tokens)
    lines = [
        "| question | n | constant answer | " + " | ".join(specs) + " |",
        "|---|---|---|" + "---|" * len(specs),
        "| *visual tokens, mean* | | | " + " | ".join(f"{tokens[spec]:.1f}" for spec in specs) + " |",
    ]
    for kind in kinds:
        cells = (f"{100 * kind.cells[s].accuracy:.1f} ± {100 * kind.cells[s].margin:.1f}" for s in specs)
        lines.append(
            f"| {kind.name} | {kind.n} | {100 * kind.share:.1f} ({kind.constant}) | "
            + " | ".join(cells)
            + " |"
        )
    if pairs:
        lines += ["", f"| question | n | {SAME_COUNT_AS} against | only it is right | only the other | p |"]
        lines += ["|---|---|---|---|---|---|"]
        for pair in pairs:
            alone = f"{pair.only_first} | {pair.only_other}"
            lines.append(f"| {pair.kind} | {pair.n} | {pair.other} | {alone} | {pair.p:.2g} |")
    held = manifest["held_out"]
    drawings = ", ".join(f"{name} ({style})" for name, style in held["drawings"].items())
    lines += [
        "",
        f"Held out of training: the backgrounds {', '.join(held['backgrounds'])}; {len(held['pairs'])} "
        f"pairs of things; the font {', '.join(held['fonts'])}; one drawing each of {drawings}.",
    ]
    return "\n".join(lines) + "\n"
