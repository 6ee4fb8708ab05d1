"""`llava tools extract-projector`: the projector of any LLaVA checkpoint, as what adapter tuning leaves."""

import argparse
from pathlib import Path

from llava.errors import UserError
from llava.model.checkpoints import (
    KINDS,
    PROJECTOR,
    inspect_checkpoint,
    llava_config_dict,
    read_weights,
    replacing,
    write_json,
    write_tensors,
)
from llava.model.llava_arch import language_model_of
from llava.model.whole import tower_name_from

PARTS = (PROJECTOR, "model.image_newline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="a LLaVA, LoRA or llava-hf checkpoint")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="mm_projector.bin or .safetensors to write, or a directory for it and config.json",
    )


def run(args: argparse.Namespace) -> int:
    info = inspect_checkpoint(args.model_path)
    source = info.extra or info.weights
    found = {}
    if source is not None:
        found = read_weights(source, keep=lambda name: name.startswith(PARTS)).tensors
    if not any(name.startswith(PROJECTOR) for name in found):
        raise UserError(f"{info.path} ({KINDS[info.kind]}) holds no projector")
    if args.output.suffix in (".bin", ".safetensors"):
        write_tensors(found, args.output)
    else:
        config = llava_config_dict(info)
        config["mm_vision_tower"] = tower_name_from(config.get("mm_vision_tower"), info.path, args.output)
        config["model_type"] = language_model_of(config, info.path / "config.json").config_class.model_type
        with replacing(args.output) as directory:
            write_tensors(found, directory / "mm_projector.bin")
            write_json(directory / "config.json", config)
    print(args.output)
    return 0
