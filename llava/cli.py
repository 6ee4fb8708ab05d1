"""The `llava` command: a table of subcommands, each a module of the package it belongs to.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`. Only the module that is asked
for is imported, so `llava score` never waits for torch.

Results go to stdout, progress and errors to stderr. Exit status: 0 fine, 1 the answer is "no" (incomplete
answers, failed checks), 2 bad input (one sentence; `--debug` adds the traceback).
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from llava import __version__
from llava.errors import UserError, exit_status

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module, one line for `llava --help`)
    "chat": ("llava.serve.chat", "ask a model about pictures, in the terminal"),
    "demo": ("llava.serve.demo", "a web page: ask about a picture, and see which patches were kept"),
    "serve": ("llava.serve.server", "an OpenAI-compatible server of any checkpoint, by vLLM"),
    "show": ("llava.analysis.show", "draw what a reducer keeps of a picture, and what it merges"),
    "bench": ("llava.analysis.bench", "where the time of a request goes, beside the dense run"),
    "roofline": (
        "llava.analysis.roofline_report",
        "what fewer visual tokens save at best on a GPU; no torch needed",
    ),
    "eval": ("llava.eval.run", "ask a model a benchmark's questions, and score the answers"),
    "score": ("llava.eval.score", "score an answers file of a benchmark; no torch needed"),
    "submit": ("llava.eval.submit", "write the file a benchmark's server takes"),
    "report": ("llava.eval.report", "one table of all runs, beside the published numbers"),
    "train": ("llava.train.train", "one training stage; its flags are LLaVA's"),
    "plot": ("llava.train.plot", "draw loss and throughput of a training run"),
    "doctor checkpoint": (
        "llava.tools.doctor_checkpoint",
        "what a directory holds, and if it would load",
    ),
    "doctor data": ("llava.data.doctor", "check every row and every image of a training file"),
    "doctor eval": ("llava.eval.doctor", "which benchmark files are missing, and where they come from"),
    "tools merge-lora": ("llava.tools.merge_lora", "LoRA or a projector and their base as one model"),
    "tools extract-projector": ("llava.tools.extract_projector", "the projector of any LLaVA checkpoint"),
    "tools consolidate": ("llava.tools.consolidate", "a self-trained checkpoint as it would be released"),
    "tools convert": ("llava.tools.convert", "to and from the format of transformers (llava-hf)"),
    "tools push": ("llava.tools.push", "a checkpoint on the Hub, with a model card"),
    "mini prepare": ("llava.mini.prepare", "build checkpoints/mini-base from two pip packages"),
    "mini world": ("llava.mini.world", "compose scenes and conversations about them"),
    "mini easy-vqa": ("llava.mini.easyvqa", "a second world: easy-vqa's pictures and questions"),
    "mini align": ("llava.mini.align", "give the projector its first meaning: patches to words"),
    "mini ship": ("llava.mini.ship", "a LoRA run as the small checkpoint that travels with the code"),
    "mini evaluate": ("llava.mini.evaluate", "accuracy by type of question and reducer, on composed scenes"),
    "mini benchmarks": ("llava.mini.benchmarks", "six small benchmark sets in the official file formats"),
    "mini demo": ("llava.mini.demo", "ask about five pictures, with every visual token and with few"),
}

PASS_THROUGH = {"train", "serve"}
"""Commands that read their flags themselves (LLaVA's are some two hundred)."""


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one subcommand (imports its module)."""
    module_name, summary = COMMANDS[command]
    parser = argparse.ArgumentParser(prog=f"llava {command}", description=summary)
    importlib.import_module(module_name).add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def usage() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = "\n".join(f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items())
    return f"usage: llava COMMAND [options]\n\n{rows}\n\n`llava COMMAND --help` lists the options.\n"


def no_such_command(argv: Sequence[str]) -> str:
    """What to tell someone who asked for a command that is not there."""
    subjects = [name.split()[1] for name in COMMANDS if name.startswith(argv[0] + " ")]
    if subjects:
        return f"`{argv[0]}` needs one of {', '.join(subjects)}, e.g. `llava {argv[0]} {subjects[0]} --help`."
    near = difflib.get_close_matches(argv[0], {name.split()[0] for name in COMMANDS}, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"there is no command `{argv[0]}`.{hint} `llava --help` lists them."


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv  # before parsing: a command's options are read by that command
    return exit_status(lambda: dispatch(argv), name=f"llava {command_of(argv) or ''}".strip(), debug=debug)


def dispatch(argv: Sequence[str]) -> int:
    """Run what is asked for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if argv[0] == "--version":
        print(f"llava {__version__}")
        return 0
    command = command_of(argv)
    if command is None:
        raise UserError(no_such_command(argv))
    rest = argv[len(command.split()) :]
    if command in PASS_THROUGH:
        rest = ["--", *rest]  # argparse: what follows are no options of mine
    args = build_parser(command).parse_args(rest)
    return importlib.import_module(COMMANDS[command][0]).run(args)


def command_of(argv: Sequence[str]) -> str | None:
    """A command is one word or two ("mini world")."""
    return next((name for name in (" ".join(argv[:2]), " ".join(argv[:1])) if name in COMMANDS), None)


if __name__ == "__main__":
    sys.exit(main())
