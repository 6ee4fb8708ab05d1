"""`python -m llava.eval.model_vqa`: LLaVA's runner for LLaVA-Bench, MM-Vet and your own question files."""

import argparse
import sys
from pathlib import Path

from llava.eval import runner
from llava.eval.model_vqa_loader import requests_of

MAX_NEW_TOKENS = 1024


def parser() -> argparse.ArgumentParser:
    return runner.parser_of(__doc__, conv_mode="llava_v1", question_file="tables/question.jsonl")


def eval_model(args: argparse.Namespace) -> int:
    args = runner.complete(parser(), args)
    requests = requests_of(Path(args.question_file), Path(args.image_folder))
    return runner.run(args, requests, "model_vqa", MAX_NEW_TOKENS)


if __name__ == "__main__":
    sys.exit(runner.main(parser(), eval_model))
