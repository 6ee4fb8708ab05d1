"""`python -m llava.eval.model_vqa_loader`: LLaVA's runner for VQAv2, GQA, VizWiz, TextVQA, POPE, MME and
SEED.
"""

import argparse
import sys
from pathlib import Path

from llava.eval import runner
from llava.eval.predict import Request
from llava.eval.questions import read_questions


def parser() -> argparse.ArgumentParser:
    flags = runner.parser_of(__doc__, conv_mode="llava_v1", question_file="tables/question.jsonl")
    flags.add_argument("--max_new_tokens", type=int, default=128)
    return flags


def requests_of(question_file: Path, image_folder: Path) -> list[Request]:
    """One request a row of a JSON Lines file with question_id, image, text."""
    return [
        Request(sample.id, sample.text, sample.image, recorded=sample.text)
        for sample in read_questions(question_file, image_folder)
    ]


def eval_model(args: argparse.Namespace) -> int:
    args = runner.complete(parser(), args)
    requests = requests_of(Path(args.question_file), Path(args.image_folder))
    return runner.run(args, requests, "model_vqa_loader", args.max_new_tokens)


if __name__ == "__main__":
    sys.exit(runner.main(parser(), eval_model))
