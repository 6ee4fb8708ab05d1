"""Checkpoints of a run: written whole or not at all, and only whole ones are resumed.

`write_model` puts a stage's weights where LLaVA puts them (in the formats of `llava.model.checkpoints`),
gathering them first where DeepSpeed or FSDP have sharded them. `last_checkpoint` finds the newest
checkpoint-N that is complete. `read_model` puts an intermediate checkpoint's weights back, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from llava.errors import UserError
from llava.files import read_json, write_json
from llava.model.checkpoints import (
    TOWER,
    inspect_checkpoint,
    read_adapter,
    read_model_weights,
    read_projector,
    save_full,
    save_lora,
    save_projector,
    save_tokenizer,
)
from llava.train.arguments import TrainingArguments
from llava.train.setup import Prepared, compute_dtype, gathered

STAGING = ".saving-"
"""Prefix of the folder a checkpoint is written in before it is renamed to checkpoint-N."""

FILE_LIST = "files.json"
"""In each checkpoint: its files and their sizes in bytes, written last."""


# Writing


def write_model(trainer: Trainer, prepared: Prepared, out: Path, *, final: bool) -> None:
    """The weights of a stage in `out`; collective, the main process writes.

    Args:
        final: the run's result, in the files and dtype LLaVA leaves; else an intermediate checkpoint, which
            keeps the exact weights to resume from, and the tokenizer.
    """
    state, arguments = gather_state(trainer, prepared), cast(TrainingArguments, trainer.args)
    if not arguments.should_save:
        return
    out.mkdir(parents=True, exist_ok=True)
    config = prepared.llava.config
    config.use_cache = True  # Trainer turns it off for training; a saved model is for generation
    if prepared.stage == "projector":
        save_projector(prepared.model, out, state_dict=state)
        return
    if prepared.stage == "lora":
        lora = {name: tensor for name, tensor in state.items() if "lora_" in name}
        others = {name: tensor for name, tensor in state.items() if name not in lora}
        save_lora(prepared.model, out, state_dict=lora, non_lora_state_dict=others)
    else:
        if final and (dtype := compute_dtype(arguments)) is not torch.float32:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
            config.dtype = dtype
        save_full(prepared.llava, None, out, state_dict=state)
    if prepared.stage == "full" or not final:
        save_tokenizer(prepared.tokenizer, out)
        torch.save(trainer.args, out / "training_args.bin")


def gather_state(trainer: Trainer, prepared: Prepared) -> dict[str, Tensor]:
    """What a stage saves, on the CPU, under `model.state_dict()`'s names; collective, only the main process
    gets it. For LoRA and adapter tuning that is what trains and the projector in any case, else everything.
    """
    parts = {"projector": ["mm_projector."], "lora": ["mm_projector.", "lora_"], "full": [""]}

    def belongs(name: str) -> bool:
        return any(part in name for part in parts[prepared.stage])

    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model)
        return {name: tensor for name, tensor in (state or {}).items() if belongs(name)}
    keep = trainer.args.should_save
    state = {}
    parameters = dict(prepared.model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.requires_grad or belongs(name):
            with gathered([parameter]):  # one at a time: a whole model may not fit beside the training
                if keep:
                    whole = parameter.detach().cpu()
                    state[name] = whole.clone() if hasattr(parameter, "ds_id") else whole
    if keep and prepared.stage == "full":
        buffers = prepared.model.state_dict().items()
        state |= {name: buffer.cpu() for name, buffer in buffers if name not in parameters}
    return state


def publish(staging: Path, target: Path) -> None:
    """Let a finished checkpoint appear under its name by one rename, with a list of its files and sizes, by
    which a copy that was cut short is recognised later."""
    files = [path for path in staging.rglob("*") if path.is_file()]
    write_json(staging / FILE_LIST, {str(path.relative_to(staging)): path.stat().st_size for path in files})
    if target.exists():
        target.rename(staging.with_name("replaced"))
    staging.rename(target)
    shutil.rmtree(staging.parent)


# Resuming


def last_checkpoint(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest complete checkpoint of a run; says which ones it passes over, and why."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(run)))):
        if (problem := what_is_missing(checkpoint)) is None:
            say(f"resuming from {checkpoint}")
            return checkpoint
        say(f"{checkpoint} is not resumed: {problem}")
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, or None. (Without a list of files it is another program's.)"""
    names = {path.name for path in checkpoint.iterdir()}
    if TRAINER_STATE_NAME not in names:
        return f"it has no {TRAINER_STATE_NAME}"
    if not any(name.startswith(("optimizer", "latest")) for name in names):  # DeepSpeed's is in `latest`
        return "it has no state of the optimizer"
    try:
        sizes = read_json(checkpoint / FILE_LIST) if FILE_LIST in names else {}
    except UserError as error:
        return str(error)
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is cut short"
    return None


def read_model(prepared: Prepared, checkpoint: Path) -> None:
    """Put the weights of an intermediate checkpoint into the model, exactly.

    Raises:
        UserError: the checkpoint is of another stage or another model.
    """
    if prepared.stage == "projector":
        weights = read_projector(checkpoint / "mm_projector.bin").tensors
    else:
        info = inspect_checkpoint(checkpoint)
        if info.kind != prepared.stage:
            raise UserError(f"{checkpoint} is {info.kind}, this run {prepared.stage}: another --output_dir?")
        if isinstance(prepared.model, PeftModel):
            set_peft_model_state_dict(prepared.model, read_adapter(info))
            weights = read_projector(checkpoint / "non_lora_trainables.bin").tensors
        else:
            weights = {n: t for n, t in read_model_weights(info).tensors.items() if not n.startswith(TOWER)}
    own = dict(prepared.llava.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(f"{checkpoint}: {name} {list(tensor.shape)} does not fit this model.")
            own[name].copy_(tensor)
