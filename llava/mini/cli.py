"""`llava mini SUBJECT`: the small LLaVA that runs anywhere, from its parts to its table."""

import argparse
import importlib

SUBJECTS: dict[str, tuple[str, str]] = {
    # name: (module with add_NAME_arguments and run_NAME, one line of help)
    "prepare": ("llava.mini.prepare", "build checkpoints/mini-base from two pip packages"),
    "world": ("llava.mini.world", "compose scenes and conversations about them"),
    "align": ("llava.mini.align", "give the projector its first meaning: patches to words"),
    "evaluate": ("llava.mini.evaluate", "accuracy by type of question and reducer, on composed scenes"),
    "demo": ("llava.mini.demo", "ask about five pictures, with every visual token and with few"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (module, summary) in SUBJECTS.items():
        one = subjects.add_parser(name, help=summary, description=summary)
        getattr(importlib.import_module(module), f"add_{name}_arguments")(one)


def run(args: argparse.Namespace) -> int:
    module, _ = SUBJECTS[args.subject]
    return getattr(importlib.import_module(module), f"run_{args.subject}")(args)
