"""`llava tools consolidate`: a self-trained checkpoint as it would be released.

Safetensors shards in half precision, without the tower (it has a directory of its own) and old buffers, with
config.json and tokenizer. A tower that was trained along (`unfreeze_mm_vision_tower`) is kept.
"""

import argparse
from pathlib import Path

from llava.errors import UserError
from llava.model.checkpoints import KINDS, inspect_model
from llava.model.whole import load_whole, save_whole
from llava.tools import add_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--src", required=True, help="a whole LLaVA checkpoint")
    parser.add_argument("--dst", required=True, type=Path, help="directory to write")
    add_dtype(parser, default="float16")


def run(args: argparse.Namespace) -> int:
    info = inspect_model(args.src)
    if info.kind != "full":
        raise UserError(
            f"{info.path} is {KINDS[info.kind]}, not a whole LLaVA: `llava tools merge-lora` and "
            "`llava tools convert` make one"
        )
    tokenizer, model, weights = load_whole(info, args.dtype)
    save_whole(model, tokenizer, info, weights, args.dst)
    print(args.dst)
    return 0
