"""`llava mini evaluate`: the test bed that compares reducers, on scenes the model never saw.

Every question of a world (`llava mini world --split dev` or `test`) is scored for every reducer at every
number of tokens, in one forward pass a scene and reducer: the questions about a picture stand one behind
another, each sees the picture and itself, and the probability of each right answer is read off. A question
counts as right where every token of the right answer, its end included, is the likeliest: where greedy
decoding says just that.

OUT gets a file of answers for each reducer and number, appended scene by scene (the same command goes on
where it was), table.md, table.json, and accuracy.png, accuracy against tokens.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.files import read_json, write_json, write_text

REDUCERS = (
    *("prumerge+", "prumerge", "random", "topk", "pool", "visionzip", "scope", "vispruner", "divprune"),
    *("hiprune", "holov", "tome", "evit"),
)
COUNTS = (16, 32, 64, 144)
REFERENCES = ("prumerge+", "random")
"""Every reducer is tested against these where they keep as many tokens (within one: PruMerge appends one)."""

VERSION = "smollm2"  # conversation template of the small model
RESAMPLES = 1000


# Asking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", default="checkpoints/mini-lora")
    parser.add_argument("--model-base", default="checkpoints/mini-base")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `llava mini world`")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers, table and plot")
    parser.add_argument(
        "--reducers", nargs="+", metavar="SPEC", help="default: all that do not read the question"
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="try each reducer with each number (default: 16 32 64 144)",
    )
    parser.add_argument("--scenes", type=int, default=None, help="only the first so many scenes")
    parser.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")


def run(args: argparse.Namespace) -> int:
    from llava.engine import ModelSource

    questions = read_questions(args.data, args.scenes)
    specs = args.reducers
    if args.tokens or not args.reducers:
        names, counts = args.reducers or REDUCERS, args.tokens or COUNTS
        specs = ["none", *(f"{name}(tokens={count})" for count in counts for name in names)]
    check_settings(args)
    files = {spec: AnswersFile(args.out / f"{file_name(spec)}.jsonl") for spec in specs}
    if any(question["image"] not in file.rows for file in files.values() for question in questions):
        source = ModelSource(args.model_path, args.model_base, conv_mode=VERSION, device=args.device)
        ask(source.load(), args.data, questions, files)
    write_report(args.out, questions, {spec: file.rows for spec, file in files.items()})
    print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


def read_questions(folder: Path, scenes: int | None) -> list[dict]:
    """The rows of questions.jsonl, those of the first `scenes` pictures."""
    index = folder / "questions.jsonl"
    if not index.is_file():
        raise UserError(
            f"{index} is missing; `llava mini world --edition 2 --split dev --n 300 --out {folder}` makes it."
        )
    rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
    chosen = set(list(dict.fromkeys(row["image"] for row in rows))[:scenes])
    return [row for row in rows if row["image"] in chosen]


def check_settings(args: argparse.Namespace) -> None:
    """Answers of another model or another world must not mix with these."""
    world = {
        key: value
        for key, value in read_json(args.data / "world.json").items()
        if not isinstance(value, dict)
    }
    wanted = {"model": args.model_path, "base": args.model_base, "world": world}
    file = args.out / "settings.json"
    if file.exists() and read_json(file) != wanted:
        raise UserError(f"{args.out} holds answers of another model or world: choose another --out.")
    write_json(file, wanted)


def file_name(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9=]+", "-", spec.replace("+", "-plus")).strip("-")


class AnswersFile:
    """What one reducer did, a line a scene: {"image", "tokens", "answers": {question_id: answer}}.

    Attributes:
        rows: the lines that are there, by image. One that a killed process left half written is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
        self.rows: dict[str, dict] = {row["image"]: row for row in map(json.loads, whole.splitlines())}

    def append(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["image"]] = row


@torch.inference_mode()
def ask(engine: Any, data: Path, questions: Sequence[dict], files: Mapping[str, AnswersFile]) -> None:
    """Scene by scene, so that at any moment all reducers have answered about the same ones."""
    from llava.mm_utils import load_image, process_images
    from llava.model.question import QuestionReader
    from llava.reducers import build_reducer

    model, reader = engine.model, QuestionReader(engine.model, engine.tokenizer)
    tower = model.get_vision_tower()
    reducers = {spec: build_reducer(spec) for spec in files}
    reads = {name for reducer in reducers.values() for name in reducer.asks}
    scenes: dict[str, list[dict]] = {}
    for question in questions:
        scenes.setdefault(question["image"], []).append(question)
    for image, asked in tqdm(scenes.items(), "scenes", file=sys.stderr):
        missing = [spec for spec, file in files.items() if image not in file.rows]
        if not missing:
            continue
        pixels = process_images([load_image(data / image)], engine.image_processor, model.config)
        features = tower(pixels, reads)  # once for all reducers
        if "projected" in reads:
            features = replace(features, projected=torch.stack(model.project(features.patches.unbind())))
        for spec in missing:
            reducer = reducers[spec]
            # A reducer that reads the question keeps other tokens for each.
            groups = [[question] for question in asked] if reducer.reads_question else [asked]
            answers: dict[str, dict] = {}
            for group in groups:
                read = reader(group[0]["text"], reducer) if reducer.reads_question else {}
                seen = replace(features, **{name: [value] for name, value in read.items()})
                (visual,) = model.project(reducer(seen).unbind())
                scored = score(model, engine.tokenizer, visual, group)
                answers |= {str(q["question_id"]): one for q, one in zip(group, scored, strict=True)}
            files[spec].append({"image": image, "tokens": len(visual), "answers": answers})


def score(model: Any, tokenizer: Any, visual: Tensor, questions: Sequence[dict]) -> list[dict]:
    """How likely the right answers of all questions about one picture [K, hidden] are, in one pass.

    The sequence is: system prompt and picture, question and answer, question and answer ... A question sees
    what is before the first one, and itself; its positions go on from there. So it is as if asked alone.

    Returns:
        For each question `right`, whether greedy decoding gives its answer; `logprob`, of that answer with
        its end; and `margin`, the logit of Yes minus that of No as the first token.
    """
    from llava.data import encode_conversation

    encoded = []
    for question in questions:
        turns = [{"from": "human", "value": f"<image>\n{question['text']}"}]
        turns.append({"from": "gpt", "value": question["answer"]})
        encoded.append(encode_conversation(turns, tokenizer, VERSION, has_image=True))
    place = encoded[0][0].tolist().index(IMAGE_TOKEN_INDEX)
    embed = model.get_input_embeddings()
    own = [ids[place + 1 :] for ids, _ in encoded]
    targets = [labels[place + 1 :] for _, labels in encoded]
    opening = torch.cat([embed(encoded[0][0][:place].to(model.device)), visual.to(model.dtype)])
    embeds = torch.cat([opening, embed(torch.cat(own).to(model.device))])
    # owner: -1 for the opening, else the question's number.
    owner = torch.cat(
        [torch.full((len(opening),), -1), *(torch.full((len(ids),), n) for n, ids in enumerate(own))]
    )
    mask = (owner[None, :] == owner[:, None]) | (owner[None, :] == -1)
    mask &= torch.ones_like(mask).tril()
    positions = [torch.arange(len(opening)), *(len(opening) + torch.arange(len(ids)) for ids in own)]
    hidden = model.get_model()(
        inputs_embeds=embeds[None],
        attention_mask=mask[None, None].to(model.device),
        position_ids=torch.cat(positions)[None].to(model.device),
        use_cache=False,
    ).last_hidden_state[0, len(opening) :]
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    answers = []
    for states, target in zip(hidden.split([len(ids) for ids in own]), targets, strict=True):
        scored = (target != IGNORE_INDEX).nonzero().flatten()  # each is predicted one position before it
        logits = model.lm_head(states[scored - 1]).float().cpu()
        wanted = target[scored]
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
        answer = {
            "right": bool((logits.argmax(-1) == wanted).all()),
            "logprob": round(float(chosen.sum()), 4),
        }
        answers.append(answer | {"margin": round(float(logits[0, yes] - logits[0, no]), 4)})
    return answers


# Figures


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
    said: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        said.setdefault((question["type"], question["form"]), []).append(question["answer"])
    best = {kind: max(sorted(set(given)), key=given.count) for kind, given in said.items()}
    return [
        {"right": best[q["type"], q["form"]] == q["answer"], "logprob": math.nan, "margin": 0.0}
        for q in questions
    ]


# The report


def write_report(out: Path, questions: Sequence[dict], rows: Mapping[str, Mapping[str, dict]]) -> None:
    """table.md, table.json and accuracy.png from the answers by reducer and image."""
    draws = resample(questions, np.random.default_rng(0))
    answers = {
        spec: [of[question["image"]]["answers"][str(question["question_id"])] for question in questions]
        for spec, of in rows.items()
    }
    tokens = {spec: float(np.mean([row["tokens"] for row in of.values()])) for spec, of in rows.items()}
    table = {"constant answer": figures(questions, constants(questions), draws)}
    table |= {spec: figures(questions, given, draws) for spec, given in answers.items()}
    pairs = [
        Pair(first, other, *only_one_right(answers[first], answers[other]))
        for first, other in product(answers, answers)
        if name_of(other) in REFERENCES and name_of(first) != "random" and first != other
        if abs(tokens[first] - tokens[other]) < 1.5
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
    return spec.partition("(")[0]


def only_one_right(first: Sequence[dict], other: Sequence[dict]) -> tuple[int, int]:
    both = [(a["right"], b["right"]) for a, b in zip(first, other, strict=True)]
    return both.count((True, False)), both.count((False, True))


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
    """Mean accuracy against visual tokens, a line a reducer, with its intervals."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4.5), layout="constrained")
    axes = canvas.subplots()
    curves: dict[str, list[str]] = {}
    for spec in tokens:
        curves.setdefault(name_of(spec), []).append(spec)
    for name, specs in curves.items():
        specs.sort(key=tokens.__getitem__)
        means = [table[spec]["mean"] for spec in specs]
        spread = [[one.value - one.low for one in means], [one.high - one.value for one in means]]
        axes.errorbar(
            [tokens[spec] for spec in specs], [one.value for one in means], spread, label=name, marker="o"
        )
    axes.axhline(
        table["constant answer"]["mean"].value, color="grey", linestyle="--", label="constant answer"
    )
    axes.set(xscale="log", xlabel="visual tokens", ylabel="percent right, mean over kinds of questions")
    axes.legend(fontsize="small", ncols=2)
    canvas.savefig(file, dpi=120)
