"""The benchmarks by name. Every module here but `base` is one and declares it as `BENCHMARK`."""

import difflib
import importlib
import pkgutil

from llava.errors import UserError
from llava.eval.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        importlib.import_module(f"{__name__}.{module.name}").BENCHMARK
        for module in pkgutil.iter_modules(__path__)
        if module.name != "base"
    )
}


def get(name: str) -> Benchmark:
    """UserError for a name that is none, with the nearest one."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"There is no benchmark {name!r}.{hint} There are: {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]
