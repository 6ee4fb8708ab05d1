"""Checkpoints of a run: written whole or not at all, and only whole ones are resumed.

`write_model` puts a stage's weights where LLaVA puts them (in the formats of `llava.model.checkpoints`),
gathering them first where DeepSpeed or FSDP have cut them up. `last_checkpoint` finds the newest checkpoint-N
that is complete. `read_model` puts an intermediate checkpoint's weights back, bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zipfile
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.errors import UserError
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
from llava.train.setup import Prepared, compute_dtype, gathered

STAGING = ".saving-"
"""Prefix of the folder a checkpoint is written in before it is renamed to checkpoint-N."""

DOOMED = ".deleting-"


# Writing


def write_model(trainer: Trainer, prepared: Prepared, out: Path, *, final: bool) -> None:
    """The weights of a stage in `out`; collective, the main process writes.

    Args:
        final: the run's result, in the files and dtype LLaVA leaves; else an intermediate checkpoint, which
            keeps the exact weights to resume from, and the tokenizer.
    """
    state = gather_state(trainer, prepared)
    if not trainer.args.should_save:
        return
    out.mkdir(parents=True, exist_ok=True)
    config = prepared.llava.config
    config.use_cache = True  # Trainer turns it off for training; a saved model is for generation
    if prepared.stage == "projector":
        save_projector(prepared.model, out, state_dict=state, file=_projector_aside(out) if final else None)
        return
    if prepared.stage == "lora":
        lora = {name: tensor for name, tensor in state.items() if "lora_" in name}
        others = {name: tensor for name, tensor in state.items() if name not in lora}
        save_lora(prepared.model, out, state_dict=lora, non_lora_state_dict=others)
    else:
        if final and (dtype := compute_dtype(trainer.args)) is not torch.float32:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
            config.dtype = dtype
        save_full(prepared.llava, None, out, state_dict=state)
    if prepared.stage == "full" or not final:
        save_tokenizer(prepared.tokenizer, out)
        torch.save(trainer.args, out / "training_args.bin")


def _projector_aside(out: Path) -> Path | None:
    """LLaVA's habit: a run whose folder is called checkpoint-X leaves its projector in ../mm_projector/."""
    if out.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return out.parent / "mm_projector" / f"{out.name}.bin"
    return None


def gather_state(trainer: Trainer, prepared: Prepared) -> dict[str, Tensor]:
    """What a stage saves, on the CPU, under `model.state_dict()`'s names; collective, only the main process
    gets it. For LoRA and adapter tuning that is what trains and the projector in any case, else everything.
    """
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model)
        return {name: t for name, t in state.items() if _belongs(name, prepared)} if state else {}
    named = list(prepared.model.named_parameters(remove_duplicate=False))
    keep = trainer.args.should_save
    state = {}
    for name, parameter in named:
        if not (parameter.requires_grad or _belongs(name, prepared)):
            continue
        with gathered([parameter]):  # one at a time: a whole model may not fit beside the training
            if keep:
                whole = parameter.detach().cpu()
                state[name] = whole.clone() if hasattr(parameter, "ds_id") else whole
    if keep and prepared.stage == "full":
        for name, buffer in prepared.model.state_dict().items():
            if name not in state and name not in dict(named):
                state[name] = buffer.cpu()
    return state


def _belongs(name: str, prepared: Prepared) -> bool:
    """Whether a stage saves a weight that does not train."""
    if prepared.stage == "full":
        return True
    if prepared.stage == "projector":
        return "mm_projector." in name or (
            prepared.llava.config.mm_use_im_start_end and "embed_tokens" in name
        )
    return "mm_projector." in name or "lora_" in name


def publish(staging: Path, target: Path) -> None:
    """Let a finished checkpoint appear under its name, by one rename; an older one of that name goes."""
    if target.exists():
        discard(target)
    staging.rename(target)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill in the middle does not leave a part of it under its name."""
    doomed = checkpoint.with_name(DOOMED + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(run: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: keep all)."""
    if limit:
        for checkpoint in checkpoints(run)[:-limit]:
            discard(checkpoint)


def clean(run: Path) -> None:
    """Delete what a killed run left unfinished."""
    for prefix in (STAGING, DOOMED):
        for left_over in run.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)


# Resuming


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders of a run, oldest first, complete or not."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]
    return sorted(
        (path for path in found if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2])
    )


def last_checkpoint(run: Path, say=lambda text: None) -> Path | None:
    """The newest complete checkpoint of a run; says which ones it passes over, and why."""
    for checkpoint in reversed(checkpoints(run)):
        if (flaw := what_is_missing(checkpoint)) is None:
            return checkpoint
        say(f"{checkpoint} is not resumed: {flaw}")
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, or None if it can.

    Ours appear whole; this guards against copies cut short and folders from elsewhere. No weight is read: a
    safetensors file tells its length in its header, a file of torch.save ends with its table of contents.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no trainer_state.json"
    except (ValueError, OSError):
        return "its trainer_state.json is cut short"
    if "global_step" not in state:
        return "its trainer_state.json has no global_step"
    files = {path.name: path for path in checkpoint.iterdir()}
    weights = (
        "mm_projector.bin",
        "adapter_model.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    )
    if not any(name in files for name in weights) and not any("pytorch_model_fsdp" in name for name in files):
        return "it has no weights"
    if "adapter_model.safetensors" in files and "non_lora_trainables.bin" not in files:
        return "it has no projector (non_lora_trainables.bin)"
    has_optimizer = any(name.startswith("optimizer") for name in files)
    if not has_optimizer and "latest" not in files:
        return "it has no optimizer state"
    if has_optimizer and "scheduler.pt" not in files:
        return "it has no scheduler state"
    if "model.safetensors.index.json" in files:
        shards = set(json.loads(files["model.safetensors.index.json"].read_text())["weight_map"].values())
        if lost := sorted(shards - files.keys()):
            return f"{lost[0]} is missing"
    for path in sorted(checkpoint.rglob("*")):
        if not _is_whole(path):
            return f"{path.relative_to(checkpoint)} is cut short"
    return None


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8 or size < 8 + (length := struct.unpack("<Q", head)[0]):
                return False
            try:
                header = json.loads(file.read(length))
            except ValueError:
                return False
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return size == 8 + length + max(ends, default=0)
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)
    return True


def read_model(prepared: Prepared, checkpoint: Path) -> None:
    """Put the weights of an intermediate checkpoint into the model, exactly.

    Raises:
        UserError: the checkpoint is of another stage or another model.
    """
    if prepared.stage == "projector":
        weights = read_projector(checkpoint / "mm_projector.bin").tensors
        _copy(prepared, weights, checkpoint)
        return
    info = inspect_checkpoint(checkpoint)
    if info.kind != prepared.stage:
        raise UserError(
            f"{checkpoint} is a {info.kind} checkpoint, this run is {prepared.stage}: another --output_dir?"
        )
    if isinstance(prepared.model, PeftModel):
        set_peft_model_state_dict(prepared.model, read_adapter(info))
        weights = read_projector(checkpoint / "non_lora_trainables.bin").tensors
    else:
        weights = {n: t for n, t in read_model_weights(info).tensors.items() if not n.startswith(TOWER)}
    _copy(prepared, weights, checkpoint)


def _copy(prepared: Prepared, weights: dict[str, Tensor], checkpoint: Path) -> None:
    own = dict(prepared.llava.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(f"{checkpoint}: {name} {list(tensor.shape)} does not fit this model.")
            own[name].copy_(tensor)
