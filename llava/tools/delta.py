"""Weights as a difference to their base, how the first LLaVA models were published.

`llava tools apply-delta`: target = base + delta. `llava tools make-delta`: delta = target - base. What the
base does not have (the projector) is taken as it is; embeddings with added rows differ where both have rows.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from llava.errors import UserError
from llava.model.checkpoints import (
    EMBEDDINGS,
    KINDS,
    PROJECTOR,
    TOKENIZER_FILES,
    TOWER,
    CheckpointInfo,
    inspect_checkpoint,
    read_model_weights,
    replacing,
    write_json,
    write_weights,
)

BESIDE = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BESIDE += ("merges.txt", "generation_config.json")


def combine(base: dict[str, Tensor], other: dict[str, Tensor], sign: int, where: Path) -> dict[str, Tensor]:
    """other + sign * base, weight by weight, in `other`'s dtype.

    Raises:
        UserError: the two do not belong to one model.
    """
    if missing := sorted(name for name in base.keys() - other.keys()):
        raise UserError(
            f"{where} lacks {len(missing)} weights of the base ({missing[0]}, ...): not its delta"
        )
    result = {}
    for name, tensor in other.items():
        if name not in base:
            if not name.startswith(PROJECTOR):
                raise UserError(f"{where} holds {name}, which the base does not have: it is the wrong base")
            result[name] = tensor
            continue
        term = base[name]
        grown = name in EMBEDDINGS and term.shape[0] < tensor.shape[0] and term.shape[1:] == tensor.shape[1:]
        if term.shape != tensor.shape and not grown:
            raise UserError(
                f"{where}: {name} has shape {list(tensor.shape)}, in the base {list(term.shape)}: wrong base"
            )
        result[name] = tensor.clone()
        result[name][: term.shape[0]].add_(term.to(tensor.dtype), alpha=sign)
    return result


def _whole(path: str) -> CheckpointInfo:
    info = inspect_checkpoint(path)
    if info.kind not in ("full", "plain_lm"):
        raise UserError(f"{info.path} is {KINDS[info.kind]}, not a whole model")
    return info


def _weights(info: CheckpointInfo) -> dict[str, Tensor]:
    return read_model_weights(info).select(lambda name: not name.startswith(TOWER)).tensors


def write_combined(base: str, other: str, sign: int, out: Path) -> None:
    """A checkpoint with `other`'s config and tokenizer."""
    info = _whole(other)
    with torch.inference_mode():
        tensors = combine(_weights(_whole(base)), _weights(info), sign, info.path)
    with replacing(out) as directory:
        write_weights(tensors, directory)
        for name in BESIDE:
            if (info.path / name).is_file():
                shutil.copy(info.path / name, directory)
        write_json(directory / "config.json", info.config)
    print(out)
