"""`llava tools merge-lora`: LoRA weights added to their base, as a whole model that needs no base any more.

Takes projector-only checkpoints too: then base and projector become one model.
"""

import argparse
from pathlib import Path

from llava.errors import UserError
from llava.model.checkpoints import KINDS, inspect_model
from llava.model.whole import load_whole, save_whole
from llava.tools import add_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="LoRA (or projector-only) checkpoint")
    parser.add_argument(
        "--model-base", help="its base; default: the one it names, if that is on this machine"
    )
    parser.add_argument("--save-model-path", "--out", required=True, type=Path, help="directory to write")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    info = inspect_model(args.model_path, args.model_base)
    if not info.needs_base:
        raise UserError(f"{info.path} is {KINDS[info.kind]}: there is nothing to merge")
    tokenizer, model, weights = load_whole(info, args.dtype)
    save_whole(model, tokenizer, info, weights, args.save_model_path)
    print(args.save_model_path)
    return 0
