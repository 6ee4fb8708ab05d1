"""Timing on a device that works in the background: synchronise, then look at the clock."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

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
