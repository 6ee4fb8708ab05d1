"""`llava tools convert --to llava-hf|llava`: between LLaVA's own format and transformers'.

The two hold the same weights under other names. llava-hf keeps the tower inside and has rows for `<image>`,
`<pad>` and filling behind the vocabulary; LLaVA's format names the tower and has no such rows. There and back
is the same model, bit for bit.
"""

import argparse
from pathlib import Path

from llava.errors import UserError
from llava.model.checkpoints import inspect_model, write_llava_hf, write_tower
from llava.model.load import tower_of
from llava.model.whole import load_whole, save_whole
from llava.tools import add_dtype

TOWER_FOLDER = "vision_tower"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=("llava-hf", "llava"), help="format to write")
    parser.add_argument("--model-path", required=True, help="any LLaVA checkpoint; LoRA weights are merged")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument(
        "--vision-tower",
        help="--to llava-hf: the tower, if the one the checkpoint names is not here; --to llava: the name to "
        "record for llava-hf's tower (openai/clip-vit-large-patch14-336), which is else written as well",
    )
    parser.add_argument("--out", "--output", required=True, type=Path, help="directory to write")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    info = inspect_model(args.model_path, args.model_base)
    if not info.is_llava:
        raise UserError(f"{info.path} has no projector: it is not a LLaVA checkpoint")
    tokenizer, model, weights = load_whole(info, args.dtype)
    if args.to == "llava-hf":
        tower = tower_of(info, model.config, weights, args.vision_tower, dtype=model.dtype)
        write_llava_hf(model, tokenizer, tower, args.out)
        print(args.out)
        return 0
    if args.vision_tower is not None:
        model.config.mm_vision_tower = args.vision_tower
    elif info.llava_config.kind == "llava_hf":
        tower = tower_of(info, model.config, weights, dtype=model.dtype)
        write_tower(tower, args.out / TOWER_FOLDER)
        # With the directory's own name in front another folder called like that is not taken for it.
        model.config.mm_vision_tower = f"{args.out.absolute().name}/{TOWER_FOLDER}"
    save_whole(model, tokenizer, info, weights, args.out)
    print(args.out)
    return 0
