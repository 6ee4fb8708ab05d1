"""What a training command line leaves open and is decided for the user: precision, attention, accumulation.

Each function changes the parsed flags in place and says (`say`) what it decided, one sentence each.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from transformers.integrations import get_available_reporting_integrations

from llava import hardware
from llava.errors import UserError


def decide_precision(values: argparse.Namespace, given: set[str], say: Callable[[str], None]) -> None:
    """Set bf16, fp16, tf32, use_cpu and attn_implementation as the flags and the hardware have it."""
    asked = [flag for flag in ("bf16", "fp16") if getattr(values, flag)]
    if values.precision in ("bf16", "fp16", "fp32"):
        asked.append(values.precision)
    if len(set(asked)) > 1:
        raise UserError(f"--bf16, --fp16 and --precision ask for {' and '.join(asked)}: give one of them.")
    by_hardware = values.precision == "auto" and not {"bf16", "fp16"} & given
    dtype = None if by_hardware else asked[0] if asked else "fp32"
    try:
        plan = hardware.plan(
            "cpu" if values.use_cpu else None, dtype=dtype, attention=values.attn_implementation
        )
    except ValueError as error:
        raise UserError(f"{error} (--precision, --bf16, --fp16, --attn_implementation, --use_cpu)") from error
    for reason in plan.reasons:
        say(reason)
    name = str(plan.dtype).removeprefix("torch.")
    values.bf16, values.fp16 = name == "bfloat16", name == "float16"
    values.use_cpu = plan.device.type == "cpu"
    values.attn_implementation = plan.attention
    if values.fp16 and values.use_cpu:
        raise UserError("--fp16 needs a GPU: on a CPU use --bf16 True, or neither.")
    if values.precision == "auto" and values.tf32 is None and plan.tf32:
        values.tf32 = True
    if values.gradient_checkpointing and values.gradient_checkpointing_kwargs is None:
        # The other kind loses the gradient where no input of a layer needs one (LoRA on a frozen projector).
        values.gradient_checkpointing_kwargs = {"use_reentrant": False}


def decide_accumulation(values: argparse.Namespace, given: set[str], say: Callable[[str], None]) -> None:
    """Split --global_batch_size into batch per device and accumulation steps."""
    if (asked := values.global_batch_size) is None:
        return
    if "gradient_accumulation_steps" in given:
        say("--gradient_accumulation_steps was given, so --global_batch_size is left aside")
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if asked < world:
        raise UserError(f"--global_batch_size {asked}: {world} processes need at least one sample each.")
    batch, steps = split_global_batch(asked, values.per_device_train_batch_size, world)
    total = batch * steps * world
    exactly = "" if total == asked else f", the nearest to the {asked} asked for"
    say(f"global batch {total}{exactly}: {batch} per device x {steps} accumulation steps x {world} processes")
    values.per_device_train_batch_size, values.gradient_accumulation_steps = batch, steps


def split_global_batch(total: int, per_device: int, world: int) -> tuple[int, int]:
    """(batch per device, accumulation steps) with batch * steps * world == total and the largest
    batch <= per_device. Where `world` does not divide `total` (>= world), the batch stays `per_device` and
    the steps are those that come nearest.

    >>> split_global_batch(160, 16, 4), split_global_batch(160, 20, 4), split_global_batch(160, 16, 3)
    ((10, 4), (20, 2), (16, 3))
    """
    if total % world:
        return per_device, max(1, round(total / (per_device * world)))
    share = total // world
    batch = max(size for size in range(1, min(per_device, share) + 1) if share % size == 0)
    return batch, share // batch


def drop_missing_trackers(values: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Leave out trackers that are not installed, which Trainer would refuse after the model is loaded."""
    asked = values.report_to if isinstance(values.report_to, list) else [values.report_to]
    missing = set(asked) - {None, "none", "all", *get_available_reporting_integrations()}
    for name in sorted(missing):
        say(f"--report_to {name}: not installed, so left out (log.jsonl is written in any case)")
    if missing:
        values.report_to = [name for name in asked if name not in missing] or "none"
