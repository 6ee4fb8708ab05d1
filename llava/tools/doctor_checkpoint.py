"""`llava doctor checkpoint PATH`: what a directory holds, what it needs, and whether it would load.

Reads names and shapes only, which takes a moment for a model of any size; `--deep` reads every value.
Exit status 1 if something would keep the model from loading.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from llava.errors import UserError
from llava.model.checkpoints import (
    KINDS,
    PROJECTOR,
    TOWER,
    CheckpointInfo,
    inspect_checkpoint,
    llava_config_dict,
    read_adapter,
    read_model_weights,
    resolve_directory,
)
from llava.model.load import build_config, language_model_weights, tokenizer_of
from llava.model.vision_tower import load_vision_tower

PARTS = {"projector": PROJECTOR, "tower": TOWER}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="directory, or owner/name on the Hub")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument("--deep", action="store_true", help="read every weight and look for NaN and infinity")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report, problems = examine(args.path, args.model_base, deep=args.deep)
    if args.json:
        print(json.dumps({**report, "problems": problems}, indent=2))
    else:
        width = max(len(name) for name in report)
        for name, value in report.items():
            print(f"{name.ljust(width)}  {value}")
        for problem in problems:
            print(f"{'problem'.ljust(width)}  {problem}")
        if not problems:
            print(f"{'result'.ljust(width)}  nothing wrong found")
    return 1 if problems else 0


def examine(path: str, base: str | None = None, *, deep: bool = False) -> tuple[dict[str, str], list[str]]:
    """What there is to say about a checkpoint, in order, and what is wrong with it.

    Raises:
        UserError: there is nothing to examine.
    """
    info = inspect_checkpoint(path, base)
    report = {
        "checkpoint": str(info.path),
        "kind": f"{info.kind}: {KINDS[info.kind]}",
        "files": ", ".join(f"{file.name} ({_size(file)})" for file in info.files),
    }
    problems: list[str] = []

    def trying(step: Iterator[tuple[str, str]]) -> None:
        try:
            report.update(step)
        except UserError as error:
            problems.append(str(error))

    if info.needs_base:
        trying(_base(info))
        if info.base is None:
            return report, problems
    if info.kind == "vision_tower":
        trying(_own_tower(info))
    else:
        trying(_tokenizer(info))
    if info.is_llava:
        trying(_config(info))
        trying(_tower(info))
    if info.kind != "vision_tower":
        trying(_weights(info))
    if deep and not problems:
        trying(_values(info))
    return report, problems


def _base(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    base = info.require_base()
    yield "base", f"{base.path} ({base.kind}), trained on {info.declared_base or 'an unnamed one'}"


def _tokenizer(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    tokenizer = tokenizer_of(info)
    of = "" if info.has_tokenizer else "the base's, "
    yield "tokenizer", f"{of}{type(tokenizer).__name__}, {len(tokenizer)} tokens, pad {tokenizer.pad_token}"


def _config(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    raw = llava_config_dict(info)
    config = build_config(raw, info)
    yield (
        "language model",
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}",
    )
    yield "projector", f"{config.mm_projector_type}, {config.mm_hidden_size} -> {config.hidden_size}"
    yield "pictures", f"{config.image_aspect_ratio or 'cropped'}, layer {config.mm_vision_select_layer}"
    yield "reducer", raw.get("mm_token_reducer") or "not recorded: every visual token is used"


def _tower(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    config = build_config(llava_config_dict(info), info)
    owner = info.llava_config
    if owner.kind == "llava_hf":
        yield "vision tower", "inside"
        return
    if not config.mm_vision_tower:
        raise UserError(f"{owner.path / 'config.json'} names no vision tower: pass --vision-tower PATH")
    path = resolve_directory(config.mm_vision_tower, beside=owner.path, remedy="--vision-tower PATH")
    tower = inspect_checkpoint(path)
    if tower.kind != "vision_tower":
        raise UserError(f"{path} is {KINDS[tower.kind]}, not a vision tower")
    yield "vision tower", f"{config.mm_vision_tower} ({tower.config['model_type']}, {path})"


def _own_tower(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    tower = load_vision_tower(info.path)
    rows, columns = tower.grid
    yield (
        "patches",
        f"{rows} x {columns} of an image {tower.image_size} wide, {tower.hidden_size} numbers each",
    )


def _weights(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    found = read_model_weights(info)
    if info.is_llava:
        language_model_weights(info, build_config(llava_config_dict(info), info), found)
    counts = dict.fromkeys(("language model", *PARTS), 0)
    for name in found.tensors:
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), "language model")
        counts[part] += 1
    parts = ", ".join(f"{count} of the {part}" for part, count in counts.items() if count)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})
    total = sum(tensor.numel() for tensor in found.tensors.values())
    yield "weights", f"{parts}; {total / 1e6:.1f} M numbers, {' and '.join(dtypes)}"
    if info.kind == "lora":
        adapter = read_adapter(info)
        rank, alpha, targets = (
            info.adapter_config.get(name) for name in ("r", "lora_alpha", "target_modules")
        )
        on = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
        yield "adapter", f"{len(adapter)} tensors, rank {rank}, alpha {alpha}, on {on}"


def _values(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    found = read_model_weights(info)
    if info.kind == "lora":
        for name, tensor in read_adapter(info).items():
            found.set(name, tensor, info.adapter)
    for name, tensor in tqdm(found.tensors.items(), desc="values", unit="tensor", leave=False):
        if not torch.isfinite(tensor).all():
            raise UserError(f"{found.source[name]}: {name} holds NaN or infinity: download or train it again")
    yield "values", "finite"


def _size(file: Path) -> str:
    if not file.is_file():
        return "missing"
    size = float(file.stat().st_size)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
