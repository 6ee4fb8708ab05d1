"""`llava doctor data FILE --image-folder DIR`: looks at every row and every image before a run does.

Each finding is a row, a kind and a reason. Kinds: `row` (not a sample at all), `turns` (who speaks, in which
order), `empty` (a turn without text), `image-count` (`<image>` and images do not match), `image` (missing or
damaged), `duplicate` (an earlier row says the same); with `--tokenizer` also `too-long` (cut at
--model-max-length) and `masked` (nothing to learn: a text holds the template's own markers).

Exit status 0: nothing found; 1: something was.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("row", "turns", "empty", "image-count", "image", "duplicate", "too-long", "masked")
BATCH = {"rows": 256, "images": 16}
"""How many a process looks at before it reports."""


@dataclass(frozen=True, order=True)
class Finding:
    row: int
    id: str
    kind: str
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON, JSONL or parquet")
    parser.add_argument("--image-folder", type=Path, help="without it, images are not looked at")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="also encode every row with this model's tokenizer"
    )
    parser.add_argument("--version", default="v1", help="template, as in training (default: %(default)s)")
    parser.add_argument("--model-max-length", type=int, default=2048, help="default: %(default)s")
    parser.add_argument(
        "--visual-tokens", type=int, default=576, help="an image takes, for too-long (default: %(default)s)"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        choices=KINDS,
        metavar="KIND",
        help=f"one of {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)"
    )
    parser.add_argument("--json", action="store_true", help="one object instead of lines")


def run(args: argparse.Namespace) -> int:
    if args.image_folder is None:
        print("no --image-folder: the images themselves are not looked at", file=sys.stderr)
    elif not args.image_folder.is_dir():
        raise UserError(f"there is no image folder {args.image_folder}; check --image-folder.")
    report = examine(
        args.file,
        image_folder=args.image_folder,
        tokenizer_path=args.tokenizer,
        version=args.version,
        max_length=args.model_max_length,
        visual_tokens=args.visual_tokens,
        workers=args.workers,
    )
    found = [finding for finding in report.findings if finding.kind not in args.ignore]
    counts = dict(Counter(finding.kind for finding in found))
    if args.json:
        rows = [asdict(finding) for finding in found]
        head = {"file": str(args.file), "rows": report.rows, "images": report.images}
        print(json.dumps({**head, "counts": counts, "findings": rows}, ensure_ascii=False))
    else:
        for finding in found:
            print(f"row {finding.row} (id {finding.id}): {finding.kind}: {finding.reason}")
        said = ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if kind in counts) or "nothing wrong"
        images = f"{report.images:,} images" if args.image_folder else "no images"
        print(f"{args.file}: {report.rows:,} rows, {images} looked at: {said}")
    return 1 if found else 0


@dataclass(frozen=True)
class Report:
    """rows, images: how many were looked at (an image used by several rows once)."""

    rows: int
    images: int
    findings: list[Finding]


def examine(
    file: Path,
    *,
    image_folder: Path | None = None,
    tokenizer_path: str | None = None,
    version: str = "v1",
    max_length: int = 2048,
    visual_tokens: int = 576,
    workers: int = 0,
) -> Report:
    """All findings of a data file, by row. Progress bars go to stderr."""
    from llava.data.table import image_names, open_table

    table = open_table(file)
    tokenizer = None
    if tokenizer_path is not None:
        from llava.model.tokenization import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_path, model_max_length=int(1e9))  # lengths are judged here
    checks = RowChecks(table, tokenizer, version, max_length, visual_tokens)

    findings: list[Finding] = []
    first_with: dict[bytes, int] = {}
    for row, (identity, digest, found) in enumerate(_in_parallel(checks, workers, "rows")):
        findings += [Finding(row, identity, kind, reason) for kind, reason in found]
        if digest:
            first = first_with.setdefault(digest, row)
            if first != row:
                findings.append(Finding(row, identity, "duplicate", f"the same as row {first}"))

    names: list[str] = []
    if image_folder is not None:
        rows_of: dict[str, list[int]] = {}
        for row, images in enumerate(image_names(table)):
            for name in images:
                rows_of.setdefault(name, []).append(row)
        names = list(rows_of)
        reasons = _in_parallel(ImageChecks(image_folder, names), workers, "images")
        for name, reason in zip(names, reasons, strict=True):
            if reason:
                findings += [Finding(row, table[row]["id"], "image", reason) for row in rows_of[name]]
    return Report(len(table), len(names), sorted(findings))


def _in_parallel(checks: Sequence[Any], workers: int, what: str) -> Iterator[Any]:
    """`checks[0], checks[1], ...`, made by torch's loader processes, with a progress bar."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    batch = BATCH[what]
    few = len(checks) <= 4 * batch  # starting processes would take longer
    loader = DataLoader(
        checks, batch_size=batch, num_workers=0 if few else workers, collate_fn=list, prefetch_factor=None
    )
    text = logging.getLogger("llava.data.text")  # says of each masked row what becomes a finding here
    level = text.level
    text.setLevel(logging.ERROR)
    try:
        with tqdm(total=len(checks), desc=f"checking {what}", unit=f" {what}", delay=1) as bar:
            for results in loader:
                yield from results
                bar.update(len(results))
    finally:
        text.setLevel(level)


class RowChecks:
    """Checks of the text: item i is (id, digest of the content, [(kind, reason), ...]) of row i."""

    def __init__(self, table: "Dataset", tokenizer: Any, version: str, max_length: int, visual_tokens: int):
        self.table = table
        self.tokenizer = tokenizer
        self.version = version
        self.max_length = max_length
        self.visual_tokens = visual_tokens

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, bytes, list[tuple[str, str]]]:
        row = self.table[index]
        if row["problem"]:
            return row["id"], b"", [("row", row["problem"])]
        content = json.dumps([row["image"], row["conversations"]], sort_keys=True).encode()
        found = list(check_turns(row["conversations"])) + list(
            check_image_count(row["conversations"], len(row["image"]))
        )
        if not found and self.tokenizer is not None:
            found = list(self._encoded(row))
        return row["id"], hashlib.blake2b(content, digest_size=16).digest(), found

    def _encoded(self, row: dict[str, Any]) -> Iterable[tuple[str, str]]:
        from llava.data.text import encode_conversation

        images = len(row["image"])
        try:
            ids, labels = encode_conversation(
                row["conversations"],
                self.tokenizer,
                self.version,
                has_image=images > 0,
                several_images=images > 1,
            )
        except UserError as error:
            yield "turns", str(error).rstrip(".")
            return
        if (labels == IGNORE_INDEX).all():
            yield "masked", f"none of its tokens is learnt: a text holds a marker of version {self.version}"
        length = len(ids) + images * (self.visual_tokens - 1)
        if length > self.max_length:
            yield "too-long", f"{length} tokens, the last {length - self.max_length} are cut off"


def check_turns(turns: Sequence[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Who speaks and whether they say something. A first turn from gpt is dropped in training."""
    for i, turn in enumerate(turns, 1):
        if turn["from"] not in ("human", "gpt"):
            yield "turns", f"turn {i} is from {turn['from']!r}, neither human nor gpt"
        elif not turn["value"].strip():
            yield "empty", f"turn {i}, of {turn['from']}, is empty"
    speakers = [turn["from"] for turn in turns]
    skipped = speakers[:1] == ["gpt"]
    for i, speaker in enumerate(speakers[skipped:]):
        if speaker in ("human", "gpt") and speaker != ("human", "gpt")[i % 2]:
            yield "turns", f"turn {i + 1 + skipped} is from {speaker}: human and gpt have to take turns"
            return
    if speakers[-1] == "human" or len(speakers) == skipped:
        yield "turns", "it does not end with an answer from gpt"


def check_image_count(turns: Sequence[dict[str, str]], images: int) -> Iterator[tuple[str, str]]:
    """`<image>` against images. For one image, several `<image>` in one turn count as one, as in training."""
    from llava.data.dataset import check_placeholders

    if len(turns) > 1 and turns[0]["from"] == "gpt":
        turns = turns[1:]
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    try:
        check_placeholders(turns, images, sum(counts) if images > 1 else sum(map(bool, counts)))
    except UserError as error:
        yield "image-count", str(error).removesuffix("; make them match.")


class ImageChecks:
    """Checks of the files: item i is what is wrong with image i, or None."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str | None:
        from llava.mm_utils import load_image

        try:
            load_image(self.folder / self.names[index], name=self.names[index])
        except UserError as error:
            return str(error).rstrip(".")
        return None
