"""`llava tools make-delta`: what a model adds to its base, see `llava.tools.delta`."""

import argparse
from pathlib import Path

from llava.tools.delta import write_combined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model-path", required=True, help="language model the model was trained from")
    parser.add_argument("--target-model-path", required=True, help="the model")
    parser.add_argument("--delta-path", required=True, type=Path, help="directory to write")


def run(args: argparse.Namespace) -> int:
    write_combined(args.base_model_path, args.target_model_path, -1, args.delta_path)
    return 0
