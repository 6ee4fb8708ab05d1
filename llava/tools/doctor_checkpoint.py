"""`llava doctor checkpoint PATH`: what a directory holds, what it needs, and whether it would load.

Reads names and shapes only, which takes a moment for a model of any size; `--deep` reads every value.
Exit status 1 if something would keep the model from loading.
"""

import argparse
import json
from collections.abc import Callable, Iterator
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

Facts = Iterator[tuple[str, str]]
"""Names and values to print; a UserError ends them and is printed as a problem."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="directory, or owner/name on the Hub")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument("--deep", action="store_true", help="read every weight and look for NaN and infinity")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    info = inspect_checkpoint(args.path, args.model_base)
    steps: list[Callable[[CheckpointInfo], Facts]] = [_files]
    if info.needs_base:
        steps.append(_base)
    if info.kind == "vision_tower":
        steps.append(_own_tower)
    elif info.base is not None or not info.needs_base:
        steps += [_tokenizer, *([_config, _tower] if info.is_llava else []), _weights]
    report: dict[str, str] = {}
    problems: list[str] = []
    for step in [*steps, *([_values] if args.deep else [])]:
        try:
            if step is not _values or not problems:
                report.update(step(info))
        except UserError as error:
            problems.append(str(error))

    if args.json:
        print(json.dumps({**report, "problems": problems}, indent=2))
    else:
        lines = [*report.items(), *(("problem", problem) for problem in problems)]
        if not problems:
            lines.append(("result", "nothing wrong found"))
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"{name.ljust(width)}  {value}" for name, value in lines))
    return 1 if problems else 0


def _files(info: CheckpointInfo) -> Facts:
    def size(file: Path) -> str:
        return f"{file.stat().st_size / 1e6:,.1f} MB" if file.is_file() else "missing"

    yield "checkpoint", str(info.path)
    yield "kind", f"{info.kind}: {KINDS[info.kind]}"
    yield "files", ", ".join(f"{file.name} ({size(file)})" for file in info.files)


def _base(info: CheckpointInfo) -> Facts:
    base = info.require_base()
    yield "base", f"{base.path} ({base.kind}), trained on {info.declared_base or 'an unnamed one'}"


def _tokenizer(info: CheckpointInfo) -> Facts:
    tokenizer = tokenizer_of(info)
    of = "" if info.has_tokenizer else "the base's, "
    yield "tokenizer", f"{of}{type(tokenizer).__name__}, {len(tokenizer)} tokens, pad {tokenizer.pad_token}"


def _config(info: CheckpointInfo) -> Facts:
    raw = llava_config_dict(info)
    config = build_config(raw, info)
    size = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}"
    yield "language model", f"{config.model_type}, {size}"
    yield "projector", f"{config.mm_projector_type}, {config.mm_hidden_size} -> {config.hidden_size}"
    yield "pictures", f"{config.image_aspect_ratio or 'cropped'}, layer {config.mm_vision_select_layer}"
    yield "reducer", raw.get("mm_token_reducer") or "not recorded: every visual token is used"


def _tower(info: CheckpointInfo) -> Facts:
    owner = info.llava_config
    name = build_config(llava_config_dict(info), info).mm_vision_tower
    if owner.kind == "llava_hf":
        yield "vision tower", "inside"
    elif not name:
        raise UserError(f"{owner.path / 'config.json'} names no vision tower: pass --vision-tower PATH")
    else:
        path = resolve_directory(name, beside=owner.path, remedy="--vision-tower PATH")
        tower = inspect_checkpoint(path)
        if tower.kind != "vision_tower":
            raise UserError(f"{path} is {KINDS[tower.kind]}, not a vision tower")
        yield "vision tower", f"{name} ({tower.config['model_type']}, {path})"


def _own_tower(info: CheckpointInfo) -> Facts:
    tower = load_vision_tower(info.path)
    rows, columns = tower.grid
    yield "patches", f"{rows} x {columns} of an image {tower.image_size} wide, {tower.hidden_size} wide each"


def _weights(info: CheckpointInfo) -> Facts:
    found = read_model_weights(info)
    if info.is_llava:
        language_model_weights(info, build_config(llava_config_dict(info), info), found)
    names = list(found.tensors)
    projector = sum(name.startswith(PROJECTOR) for name in names)
    tower = sum(name.startswith(TOWER) for name in names)
    counts = {"language model": len(names) - projector - tower, "projector": projector, "tower": tower}
    parts = ", ".join(f"{count} of the {part}" for part, count in counts.items() if count)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})
    total = sum(tensor.numel() for tensor in found.tensors.values())
    yield "weights", f"{parts}; {total / 1e6:.1f} M numbers, {' and '.join(dtypes)}"
    if info.kind == "lora":
        settings = {name: info.adapter_config.get(name) for name in ("r", "lora_alpha", "target_modules")}
        described = ", ".join(f"{name} {value}" for name, value in settings.items())
        yield "adapter", f"{len(read_adapter(info))} tensors, {described}"


def _values(info: CheckpointInfo) -> Facts:
    found = read_model_weights(info)
    if info.adapter is not None:
        for name, tensor in read_adapter(info).items():
            found.set(name, tensor, info.adapter)
    for name, tensor in tqdm(found.tensors.items(), desc="values", unit="tensor", leave=False):
        if not torch.isfinite(tensor).all():
            raise UserError(f"{found.source[name]}: {name} holds NaN or infinity: download or train it again")
    yield "values", "finite"
