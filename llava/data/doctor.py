"""`llava doctor data FILE --image-folder DIR`: looks at every row and every image before a run does.

Each finding is a row, a kind (see `KINDS`) and a reason. Exit status 0: nothing found; 1: something was.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    "row": "not a sample at all",
    "turns": "who speaks, in which order",
    "empty": "a turn without text",
    "image-count": "<image> and images do not match",
    "image": "missing or damaged",
    "too-long": "cut at --model-max-length (needs --tokenizer)",
    "masked": "nothing to learn, a text holds the template's own markers (needs --tokenizer)",
}


@dataclass(frozen=True, order=True)
class Finding:
    row: int
    id: str
    kind: str
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON, JSONL or parquet")
    parser.add_argument("--image-folder", type=Path, help="without it, images are not looked at")
    parser.add_argument("--tokenizer", metavar="MODEL", help="encode every row with this model's tokenizer")
    parser.add_argument("--version", default="v1", help="template, as in training")
    parser.add_argument("--model-max-length", type=int, default=2048, help="for too-long")
    parser.add_argument("--visual-tokens", type=int, default=576, help="an image takes, for too-long")
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    parser.add_argument("--ignore", action="append", default=[], choices=KINDS, metavar="KIND", help=kinds)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")


def run(args: argparse.Namespace) -> int:
    from llava.data.table import image_names, open_table
    from llava.model.tokenization import load_tokenizer

    folder = args.image_folder
    if folder is None:
        print("no --image-folder: the images themselves are not looked at", file=sys.stderr)
    elif not folder.is_dir():
        raise UserError(f"there is no image folder {folder}; check --image-folder.")
    table = open_table(args.file)
    encoder = None
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer, model_max_length=int(1e9))  # lengths are judged here
        encoder = partial(check_ids, tokenizer, args.version, args.model_max_length, args.visual_tokens)
    findings: list[Finding] = []
    rows = _in_parallel(partial(check_row, table, encoder), len(table), args.workers, "rows")
    for row, (identity, found) in enumerate(rows):
        findings += [Finding(row, identity, kind, reason) for kind, reason in found]

    rows_of: dict[str, list[int]] = {}  # an image is looked at once, however many rows use it
    if folder is not None:
        for row, images in enumerate(image_names(table)):
            for name in images:
                rows_of.setdefault(name, []).append(row)
        names = list(rows_of)
        reasons = _in_parallel(partial(check_image, folder, names), len(names), args.workers, "images")
        for name, reason in zip(names, reasons, strict=True):
            if reason:
                findings += [Finding(row, table[row]["id"], "image", reason) for row in rows_of[name]]

    findings = sorted(finding for finding in findings if finding.kind not in args.ignore)
    counts = dict(Counter(finding.kind for finding in findings))
    if args.json:
        head = {"file": str(args.file), "rows": len(table), "images": len(rows_of), "counts": counts}
        print(json.dumps({**head, "findings": [asdict(one) for one in findings]}, ensure_ascii=False))
    else:
        for finding in findings:
            print(f"row {finding.row} (id {finding.id}): {finding.kind}: {finding.reason}")
        said = ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if kind in counts) or "nothing wrong"
        print(f"{args.file}: {len(table):,} rows, {len(rows_of):,} images looked at: {said}")
    return 1 if findings else 0


def check_row(
    table: "Dataset", encoder: Callable[[dict[str, Any]], Iterator[tuple[str, str]]] | None, index: int
) -> tuple[str, list[tuple[str, str]]]:
    """(id, [(kind, reason), ...]) of a row; only one without findings is encoded."""
    row = table[index]
    if row["problem"]:
        return row["id"], [("row", row["problem"])]
    found = list(check_turns(row["conversations"], len(row["image"])))
    if not found and encoder is not None:
        found = list(encoder(row))
    return row["id"], found


def check_turns(turns: Sequence[dict[str, str]], images: int) -> Iterator[tuple[str, str]]:
    """Who speaks, whether they say something, and `<image>` against the number of images. For one image,
    several `<image>` in one turn count as one, as in training."""
    from llava.data.dataset import check_placeholders
    from llava.data.text import checked_turn, taking_turns

    try:
        if taking_turns([checked_turn(turn) for turn in turns])[-1][0] == "human":
            yield "turns", "it does not end with an answer from gpt"
    except UserError as error:
        yield "turns", str(error).rstrip(".")
    for i, turn in enumerate(turns, 1):
        if not turn["value"].strip():
            yield "empty", f"turn {i}, of {turn['from']}, is empty"
    if len(turns) > 1 and turns[0]["from"] == "gpt":  # it is dropped
        turns = turns[1:]
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    try:
        check_placeholders(turns, images, sum(counts) if images > 1 else sum(map(bool, counts)))
    except UserError as error:
        yield "image-count", str(error).rstrip(".")


def check_ids(
    tokenizer: Any, version: str, max_length: int, visual_tokens: int, row: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """What a row is for the model: too long, or nothing to learn."""
    from llava.data import text

    images = len(row["image"])
    text.logger.disabled = True  # it says of each masked row what becomes a finding here
    try:
        ids, labels = text.encode_conversation(
            row["conversations"], tokenizer, version, has_image=images > 0, several_images=images > 1
        )
    except UserError as error:
        yield "turns", str(error).rstrip(".")
        return
    finally:
        text.logger.disabled = False
    if (labels == IGNORE_INDEX).all():
        yield "masked", f"none of its tokens is learnt: a text holds a marker of version {version}"
    length = len(ids) + images * (visual_tokens - 1)
    if length > max_length:
        yield "too-long", f"{length} tokens, the last {length - max_length} are cut off"


def check_image(folder: Path, names: list[str], index: int) -> str | None:
    """What is wrong with an image file, or None."""
    from llava.mm_utils import load_image

    try:
        load_image(folder / names[index], name=names[index])
    except UserError as error:
        return str(error).rstrip(".")
    return None


def _call_each(function: Callable[[int], Any], indices: Sequence[int]) -> list[Any]:
    return [function(index) for index in indices]


def _in_parallel(function: Callable[[int], Any], count: int, workers: int, what: str) -> Iterator[Any]:
    """The results of all calls in order, made by torch's loader processes, with a progress bar."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    workers = 0 if count <= 100 else workers  # starting processes would take longer than a few calls
    indices: Any = range(count)
    call = partial(_call_each, function)  # in the process that collates a batch
    loader: Any = DataLoader(indices, batch_size=16, num_workers=workers, collate_fn=call)
    with tqdm(total=count, desc=f"checking {what}", unit=f" {what}", delay=1) as bar:
        for results in loader:
            yield from results
            bar.update(len(results))
