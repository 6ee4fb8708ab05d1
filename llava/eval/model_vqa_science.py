"""`python -m llava.eval.model_vqa_science`: LLaVA's runner for ScienceQA."""

import argparse
import sys
from pathlib import Path

from llava.eval import runner
from llava.eval.predict import Request
from llava.eval.questions import LETTER, read_conversations, with_tag

MAX_NEW_TOKENS = 1024


def parser() -> argparse.ArgumentParser:
    flags = runner.parser_of(__doc__, conv_mode="llava_v0", question_file="tables/question.json")
    flags.add_argument(
        "--answer-prompter", action="store_true", help="accepted, and without effect as in LLaVA"
    )
    flags.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    return flags


def requests_of(question_file: Path, image_folder: Path, single_pred_prompt: bool) -> list[Request]:
    """One request an entry of a JSON list with id, conversations and, for some, image."""
    requests = []
    for sample in read_conversations(question_file, image_folder):
        text = sample.text + (LETTER if single_pred_prompt else "")
        requests.append(Request(sample.id, text, sample.image, with_tag(sample, text)))
    return requests


def eval_model(args: argparse.Namespace) -> int:
    args = runner.complete(parser(), args)
    requests = requests_of(Path(args.question_file), Path(args.image_folder), args.single_pred_prompt)
    return runner.run(args, requests, "model_vqa_science", MAX_NEW_TOKENS)


if __name__ == "__main__":
    sys.exit(runner.main(parser(), eval_model))
