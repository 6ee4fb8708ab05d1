"""Timing on a device that works in the background: synchronise, then look at the clock. And peak memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

Clock = Callable[[], float]
"""Seconds from some start."""

WALL: Clock = time.perf_counter
CLOCKS: dict[str, Clock] = {"wall": WALL, "cpu": time.process_time}
"""`cpu` adds up all threads' work, so with one thread it is what a wall clock shows on an idle machine."""


@dataclass
class Stopwatch:
    """Milliseconds of named stages, each begun and ended with the device idle."""

    device: torch.device
    clock: Clock = WALL
    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.ms[name] = 1e3 * (self.now() - start)

    def now(self) -> float:
        """Seconds, once the device has done all it was told."""
        synchronise(self.device)
        return self.clock()


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile over rounds."""

    p50: float
    p95: float

    @staticmethod
    def over(values: Sequence[float]) -> "Spread":
        p50, p95 = np.percentile(values, (50, 95))
        return Spread(float(p50), float(p95))


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak: of the allocator on CUDA, of the whole process on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            _RESET.write_text("5")  # man 5 proc: resets the high-water mark of resident memory


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since `reset_peak_memory`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and _STATUS.exists():
        line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    return None
