"""What the tools share: any checkpoint as one whole model on the CPU, and the way from it to its tower."""

import argparse
import os
from pathlib import Path

import torch

from llava.errors import UserError
from llava.model.checkpoints import (
    KINDS,
    CheckpointInfo,
    Weights,
    inspect_checkpoint,
    llava_config_dict,
    read_model_weights,
    resolve_beside,
)
from llava.model.load import apply_lora, build_config, load_language_model, load_plain, tokenizer_of

DTYPES = ("auto", "float16", "bfloat16", "float32")


def add_dtype(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default,
        help=f"of the weights written; auto: as read (default: {default})",
    )


def inspect_llava(path: str, base: str | None) -> CheckpointInfo:
    """A checkpoint that is, perhaps with its base, a LLaVA or a language model.

    Raises:
        UserError: it is a tower, or its base is not known.
    """
    info = inspect_checkpoint(path, base)
    if info.kind == "vision_tower":
        raise UserError(f"{info.path} is {KINDS[info.kind]}, not a model")
    if info.needs_base:
        info.require_base()
    return info


def load_whole(info: CheckpointInfo, dtype: str = "auto", weights: Weights | None = None):
    """(tokenizer, model) of any kind of checkpoint, LoRA merged, without tower, on the CPU.

    Args:
        dtype: of the model; "auto": that of the files.
        weights: `read_model_weights(info)` where it is known already.
    """
    if not info.is_llava:
        model = load_plain(info, dtype=_dtype(dtype), device_map={"": "cpu"})
        tokenizer = tokenizer_of(info)
    else:
        weights = weights or read_model_weights(info)
        read = weights.tensors["model.norm.weight"].dtype if dtype == "auto" else _dtype(dtype)
        config = build_config(llava_config_dict(info), info)
        tokenizer = tokenizer_of(info, config)
        options = {"num_tokens": len(tokenizer), "dtype": read, "device_map": {"": "cpu"}}
        model = load_language_model(info, config, weights, **options)
    if info.kind == "lora":
        model = apply_lora(model, info, merge=True)
    model.config.name_or_path = str(info.path)
    return tokenizer, model


def _dtype(name: str) -> torch.dtype | str:
    return name if name == "auto" else getattr(torch, name)


def tower_name_from(name: str | None, old: Path, new: Path) -> str | None:
    """What `mm_vision_tower` must say in `new` to mean what `name` means in `old`.

    Hub names and absolute paths stay. A relative path that a checkpoint at `new` would not find becomes one
    that it does.
    """
    if not name or Path(name).is_absolute() or (here := resolve_beside(name, old)) is None:
        return name
    there = resolve_beside(name, new.absolute())
    if there is not None and there.resolve() == here.resolve():
        return name
    return os.path.relpath(here.resolve(), new.resolve())
