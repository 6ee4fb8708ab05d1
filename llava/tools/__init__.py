"""Tools on checkpoints: merge, extract, consolidate, convert, and what is in a directory."""

import argparse


def add_dtype(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default=default,
        help=f"of the weights written; auto: as read (default: {default})",
    )
