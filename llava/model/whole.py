"""Any checkpoint as one whole model on the CPU, to be written again: by the tools and for the vLLM server."""

from pathlib import Path
from typing import Any

import torch

from llava.model.checkpoints import (
    TOWER,
    CheckpointInfo,
    Weights,
    llava_config_dict,
    read_model_weights,
    resolve_beside,
    save_full,
)
from llava.model.load import apply_lora, build_config, load_language_model, load_plain, tokenizer_of


def load_whole(info: CheckpointInfo, dtype: str):
    """(tokenizer, model, weights as read) of any checkpoint, LoRA merged, without tower, on the CPU.

    Args:
        dtype: of the model; "auto": that of the files.
    """
    model: Any  # a LLaVA, or a language model alone
    weights = read_model_weights(info)
    options = {
        "device_map": {"": "cpu"},
        "dtype": weights.tensors["model.norm.weight"].dtype if dtype == "auto" else getattr(torch, dtype),
    }
    if info.is_llava:
        config = build_config(llava_config_dict(info), info)
        tokenizer = tokenizer_of(info, config)
        model = load_language_model(info, config, weights, num_tokens=len(tokenizer), **options)
    else:
        tokenizer, model = tokenizer_of(info), load_plain(info, **options)
    if info.kind == "lora":
        model = apply_lora(model, info, merge=True)
    model.config.name_or_path = str(info.path)
    return tokenizer, model, weights


def save_whole(model, tokenizer, info: CheckpointInfo, weights: Weights, out: Path) -> None:
    """Write a model in LLaVA's format, with the tower that the checkpoint carries where it was trained along.

    Args:
        model, tokenizer, weights: what `load_whole(info)` returned.
    """
    state = model.state_dict()
    if info.is_llava:
        config = model.config
        config.mm_vision_tower = tower_name_from(config.mm_vision_tower, info.llava_config.path, out)
        if config.unfreeze_mm_vision_tower:
            tower = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(TOWER)}
            # As LLaVA names them: CLIP's below vision_model, DINOv2's (encoder.layer) without such a level.
            level = "vision_tower." if any(".layer." in n for n in tower) else "vision_tower.vision_model."
            state |= {TOWER + level + n.removeprefix(TOWER): t.to(model.dtype) for n, t in tower.items()}
    save_full(model, tokenizer, out, state_dict=state)


def tower_name_from(name: str | None, old: Path, new: Path) -> str | None:
    """What `mm_vision_tower` must say in `new` to mean what `name` means in `old`.

    A relative path that a checkpoint at `new` would not find becomes absolute; all else stays.
    """
    here = resolve_beside(name, old) if name else None
    there = resolve_beside(name, new.absolute()) if name else None
    if here is None or (there is not None and there.resolve() == here.resolve()):
        return name
    return str(here.resolve())
