"""What a run writes about itself beside its weights: run.json, and log.jsonl, which `llava plot` draws."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava import __version__
from llava.files import write_json, write_text
from llava.train.arguments import Arguments
from llava.train.plot import LOG_FILE, read_log


def write_run_file(run: Path, arguments: Arguments, notes: list[str]) -> None:
    """RUN/run.json: all arguments, the versions, and the decisions taken for the user (`notes`)."""
    model, data, training = arguments
    packages = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
    content = {
        "model": dataclasses.asdict(model),
        "data": dataclasses.asdict(data),
        "training": training.to_dict(),
        "processes": training.world_size,
        "versions": {"llava": __version__} | {name: version(name) for name in packages if find_spec(name)},
        "notes": notes,
    }
    write_json(run / "run.json", content)


def peak_memory(device: torch.device) -> int:
    """Peak bytes this process has held: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class JsonlLog(TrainerCallback):
    """Appends every log line of transformers' Trainer to RUN/log.jsonl, from the main process.

    A resumed run writes the lines after its checkpoint again, so the old ones are deleted first.
    """

    def __init__(self, run: Path):
        self.file = run / LOG_FILE

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and self.file.exists():
            rows = [row for row in read_log(self.file) if row["step"] <= state.global_step]
            kept = [json.dumps(row) + "\n" for row in rows if "train_runtime" not in row]
            write_text(self.file, "".join(kept))

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, **logs, "time": round(time.time(), 3)}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
