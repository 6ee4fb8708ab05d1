"""Processes of their own for tests, forked from one that has the libraries in memory.

A process that imports torch, transformers and deepspeed for itself needs ten seconds before it does anything.
Functions to run in one have to be importable, and their arguments picklable.
"""

import importlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

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


def shard_on_cpus(*, fsdp: bool, deepspeed: bool) -> None:
    """In a process of its own: what the libraries do for GPUs alone, without what they do for CPUs alone."""
    if fsdp:  # accelerate shards over GPUs only, torch's FSDP2 on CPUs as well
        plain = AcceleratorState.__init__

        def as_on_gpus(self, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
            plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
            if fsdp_plugin is not None:
                self.fsdp_plugin = fsdp_plugin
                self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        AcceleratorState.__init__ = as_on_gpus
    if deepspeed:  # sums in shared memory: compiled, under a lock that a killed run leaves behind
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
