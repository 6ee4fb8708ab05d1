"""The benchmarks by name. A new one is a file that fills a `Benchmark` and one entry here."""

import difflib
import importlib

from llava.errors import UserError
from llava.eval.benchmarks.base import Benchmark

MODULES = {
    "vqav2": "vqav2",
    "textvqa": "textvqa",
    "mme": "mme",
    "pope": "pope",
    "scienceqa": "scienceqa",
    "mmbench": "mmbench",
    "mmbench_cn": "mmbench_cn",
    "gqa": "gqa",
    "vizwiz": "vizwiz",
    "seed": "seed",
    "mm-vet": "mm_vet",
    "llava-bench": "llava_bench",
}


def get(name: str) -> Benchmark:
    """UserError for a name that is none, with the nearest one."""
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"There is no benchmark {name!r}.{hint} There are: {', '.join(MODULES)}.")
    return importlib.import_module(f"{__name__}.{MODULES[name]}").BENCHMARK
