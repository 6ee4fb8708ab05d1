"""`llava tools consolidate`: a self-trained checkpoint as it would be released.

Safetensors shards in half precision, without the tower (it has a directory of its own) and old buffers, with
config.json and tokenizer. A tower that was trained along (`unfreeze_mm_vision_tower`) is kept.
"""

import argparse
from pathlib import Path

from llava.errors import UserError
from llava.model.checkpoints import KINDS, TOWER, read_model_weights, save_full
from llava.tools.whole import add_dtype, inspect_llava, load_whole, tower_name_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--src", required=True, help="a whole LLaVA checkpoint")
    parser.add_argument("--dst", required=True, type=Path, help="directory to write")
    add_dtype(parser, default="float16")


def run(args: argparse.Namespace) -> int:
    info = inspect_llava(args.src, None)
    if info.kind != "full":
        remedy = {
            "lora": "tools merge-lora",
            "projector": "tools merge-lora",
            "llava_hf": "tools convert",
        }.get(info.kind)
        raise UserError(f"{info.path} is {KINDS[info.kind]}" + (f": use `llava {remedy}`" if remedy else ""))
    weights = read_model_weights(info)
    tokenizer, model = load_whole(info, args.dtype, weights)
    state = model.state_dict()
    if model.config.unfreeze_mm_vision_tower:
        tower = {name: t for name, t in weights.tensors.items() if name.startswith(TOWER)}
        # LLaVA's names: CLIP's parts were called vision_model; DINOv2's (encoder.layer) had no such level.
        level = "vision_tower." if any(".layer." in name for name in tower) else "vision_tower.vision_model."
        state |= {TOWER + level + name.removeprefix(TOWER): t.to(model.dtype) for name, t in tower.items()}
    model.config.mm_vision_tower = tower_name_from(model.config.mm_vision_tower, info.path, args.dst)
    save_full(model, tokenizer, args.dst, state_dict=state)
    print(args.dst)
    return 0
