"""`python -m llava.eval.model_vqa_mmbench`: LLaVA's runner for MMBench, in English and Chinese."""

import argparse
import sys
from pathlib import Path

from llava.eval import runner
from llava.eval.benchmarks import mmbench
from llava.eval.benchmarks.base import LETTER
from llava.eval.benchmarks.mmbench_cn import SUFFIX as LETTER_CN
from llava.eval.predict import Request

MAX_NEW_TOKENS = 1024


def parser() -> argparse.ArgumentParser:
    flags = runner.parser_of(__doc__, conv_mode="llava_v1", question_file="tables/question.jsonl")
    flags.add_argument("--all-rounds", action="store_true", help="ask with the options in every rotation")
    flags.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    flags.add_argument("--lang", default="en", choices=("en", "cn"))
    return flags


def requests_of(question_file: Path, suffix: str, all_rounds: bool) -> list[Request]:
    requests = []
    for sample in mmbench.load(Path(), question_file):
        letters = list(mmbench.OPTIONS[: len(sample.options)])
        for turn in range(len(letters) if all_rounds else 1):
            options = [*sample.options[turn:], *sample.options[:turn]]
            text = mmbench.question_text(sample.stem, options)
            after = {"options": options, "option_char": letters[turn:] + letters[:turn]}
            requests.append(
                Request(sample.id, text + suffix, sample.image, text, before={"round_id": turn}, after=after)
            )
    return requests


def eval_model(args: argparse.Namespace) -> int:
    args = runner.complete(parser(), args)
    suffix = {"en": LETTER, "cn": LETTER_CN}[args.lang] if args.single_pred_prompt else ""
    requests = requests_of(Path(args.question_file), suffix, args.all_rounds)
    return runner.run(args, requests, "model_vqa_mmbench", MAX_NEW_TOKENS)


if __name__ == "__main__":
    sys.exit(runner.main(parser(), eval_model))
