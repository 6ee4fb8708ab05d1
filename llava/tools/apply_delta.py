"""`llava tools apply-delta`: a model from its base and its delta, see `llava.tools.delta`."""

import argparse
from pathlib import Path

from llava.tools.delta import write_combined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model-path", required=True, help="language model the delta was made from")
    parser.add_argument("--target-model-path", required=True, type=Path, help="directory to write")
    parser.add_argument("--delta-path", required=True, help="the delta")


def run(args: argparse.Namespace) -> int:
    write_combined(args.base_model_path, args.delta_path, 1, args.target_model_path)
    return 0
