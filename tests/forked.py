"""Processes of their own for tests, forked from one that has the libraries in memory.

A process that imports torch, transformers and deepspeed for itself needs ten seconds before it does anything.
Functions to run in one have to be importable, and their arguments picklable.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["llava.train.trainer", "llava.train.visual_cache", "deepspeed"])


def in_two_processes(function: Callable[..., None], *args: Any, **environment: str) -> None:
    """Call `function(*args)` in two processes as torchrun does; an error in one ends both and is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.multiprocessing.start_processes(
        _as_rank, (environment, function, args), nprocs=2, start_method="forkserver"
    )


def _as_rank(rank: int, environment: dict[str, str], function: Callable[..., None], args: tuple) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    function(*args)
