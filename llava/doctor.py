"""`llava doctor SUBJECT ...`: checks before a long run, each in the room it belongs to.

A subject is a module with `add_arguments(parser)` and `run(args) -> int`, imported only when asked for.
"""

import argparse
import importlib

SUBJECTS: dict[str, tuple[str, str]] = {
    # name: (module, one line for --help)
    "checkpoint": ("llava.tools.doctor_checkpoint", "what a directory holds, and whether it would load"),
    "data": ("llava.data.doctor", "a training file: every row and every image"),
    "eval": ("llava.eval.doctor", "the benchmarks' files: which are missing, where they come from"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"{name}: {summary}" for name, (_, summary) in SUBJECTS.items())
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="`llava doctor SUBJECT --help` lists them")


def run(args: argparse.Namespace) -> int:
    module_name, summary = SUBJECTS[args.subject]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"llava doctor {args.subject}", description=summary)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    own = parser.parse_args(args.rest)
    args.debug |= own.debug  # the command line looks there
    return module.run(own)
