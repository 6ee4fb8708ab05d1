"""`llava mini ship`: a LoRA run as the small checkpoint that travels with the code.

Copies what a released LoRA checkpoint holds (adapter, projector, config.json), weights in float16, and leaves
out what only training needs.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from llava.errors import UserError
from llava.model.checkpoints import inspect_checkpoint, read_tensors, write_json, write_tensors

KEPT = ("adapter_config.json", "config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, required=True, help="finished output_dir of a LoRA run")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/mini-lora"))


def run(args: argparse.Namespace) -> int:
    adapter, projector = args.run_dir / "adapter_model.safetensors", args.run_dir / "non_lora_trainables.bin"
    for file in (adapter, projector, *(args.run_dir / name for name in KEPT)):
        if not file.is_file():
            raise UserError(f"{file} is missing: {args.run_dir} is not a finished LoRA run.")
    write_tensors({name: t.half() for name, t in load_file(adapter).items()}, args.out / adapter.name)
    write_tensors({name: t.half() for name, t in read_tensors(projector).items()}, args.out / projector.name)
    for name in KEPT:
        write_json(args.out / name, json.loads((args.run_dir / name).read_text(encoding="utf-8")))
    size = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file())
    print(f"{args.out}: {inspect_checkpoint(args.out).kind}, {size / 2**20:.1f} MiB")
    return 0
