"""What a run tells about itself: run.json, log.jsonl, and the lines on the terminal.

`Meter` counts what goes through the model between two log lines. `JsonlLog` writes every line to
RUN/log.jsonl, which `llava plot` draws; a run that is resumed rewrites the lines after its checkpoint, so the
file reads as if nothing had happened. `Console` is the progress bar with the time left.
"""

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
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from llava.files import write_json, write_text
from llava.train.arguments import Arguments
from llava.train.plot import LOG_FILE, read_log


def write_run_file(run: Path, arguments: Arguments, notes: list[str]) -> None:
    """RUN/run.json: all arguments, the versions, and the decisions taken for the user (`notes`)."""
    model, data, training = arguments
    packages = ("llava", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
    content = {
        "model": dataclasses.asdict(model),
        "data": dataclasses.asdict(data),
        "training": training.to_dict(),
        "processes": training.world_size,
        "versions": {name: version(name) for name in packages if find_spec(name)},
        "notes": notes,
    }
    write_json(run / "run.json", content)


class Meter:
    """Samples, text tokens, images and visual tokens since the last `read`, over all processes.

    Counts stay on the device they were made on until they are read: no host sync per step.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._counts: dict[str, Tensor | int] = {"samples": 0, "text": 0, "images": 0, "visual": 0}
        self._since = time.perf_counter()

    def add(self, *, samples: int, text: Tensor | int, images: Tensor | int, visual: Tensor | int) -> None:
        """Count one forward pass. `text` are ids that are neither padding nor an image's placeholder."""
        for name, value in (("samples", samples), ("text", text), ("images", images), ("visual", visual)):
            self._counts[name] = self._counts[name] + value

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates since the last reading; collective, every process has to call it.

        Returns:
            samples_per_second, text_tokens_per_second, visual_tokens_per_second,
            visual_tokens_per_image (mean; absent where no image was seen), memory_gib (peak of one process:
            of the GPU where there is one, else resident).
        """
        seconds = time.perf_counter() - self._since
        local = torch.tensor([float(count) for count in self._counts.values()], device=accelerator.device)
        samples, text, images, visual = accelerator.reduce(local, reduction="sum").tolist()
        self._reset()
        rates = {
            "samples_per_second": samples / seconds,
            "text_tokens_per_second": text / seconds,
            "visual_tokens_per_second": visual / seconds,
        }
        if images:
            rates["visual_tokens_per_image"] = visual / images
        return {**rates, "memory_gib": peak_memory(accelerator.device) / 2**30}


def peak_memory(device: torch.device) -> int:
    """Peak bytes this process has held: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class JsonlLog(TrainerCallback):
    """Appends every log line of transformers' Trainer to RUN/log.jsonl, from the main process."""

    def __init__(self, run: Path):
        self.file = run / LOG_FILE

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            drop_after(self.file, state.global_step)

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, **logs, "time": round(time.time(), 3)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def drop_after(file: Path, step: int) -> None:
    """Remove the lines after `step`: the resumed run writes them again."""
    if not file.exists():
        return
    kept = [row for row in read_log(file) if row["step"] <= step and "train_runtime" not in row]
    write_text(file, "".join(json.dumps(row) + "\n" for row in kept))


class Console(TrainerCallback):
    """Progress bar with the time left, and one line per log entry, on stderr."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            # `initial`: a resumed run's estimate must not count the steps it did not do.
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs) -> None:
        if state.is_world_process_zero:
            tqdm.write(console_line(state.global_step, state.max_steps, logs), file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()


def console_line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """One log entry for a person.

    >>> console_line(3, 9, {"loss": 1.5, "learning_rate": 2e-4, "grad_norm": 0.5, "samples_per_second": 2.0})
    'step 3/9  loss 1.5000  lr 2.00e-04  grad 0.500  2.00 samples/s'
    """
    if "train_runtime" in logs:
        minutes, seconds = divmod(round(logs["train_runtime"]), 60)
        return f"trained to step {step} in {minutes} min {seconds} s, mean loss {logs['train_loss']:.4f}"
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "grad_norm": "grad {:.3f}",
        "samples_per_second": "{:.2f} samples/s",
        "text_tokens_per_second": "{:.0f} text tok/s",
        "visual_tokens_per_second": "{:.0f} visual tok/s",
        "visual_tokens_per_image": "{:.1f} tok/image",
        "memory_gib": "{:.2f} GiB",
    }
    parts = [text.format(logs[name]) for name, text in formats.items() if name in logs]
    return "  ".join([f"step {step}/{steps}", *parts])
