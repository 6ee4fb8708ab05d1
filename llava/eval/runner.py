"""What LLaVA's four inference scripts share: their flags, and the way onto the one loop.

`python -m llava.eval.model_vqa_loader`, `model_vqa`, `model_vqa_science` and `model_vqa_mmbench` take the
flags they always took and write the files they always wrote. Two things are new: a killed run goes on where
it was, and an answers file of another run is refused (`--overwrite`) instead of silently replaced.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.errors import UserError
from llava.eval.predict import Generation, Request
from llava.eval.run import Job, ModelSource, answer, as_rates, chunk, default_decode_workers
from llava.eval.score import report_problems
from llava.mm_utils import get_model_name_from_path


def parser_of(description: str, *, conv_mode: str, question_file: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base")
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--question-file", default=question_file)
    parser.add_argument("--answers-file", default="answer.jsonl")
    parser.add_argument("--conv-mode", default=conv_mode)
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.2, help="default: %(default)s; 0 is greedy")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=int, default=1)
    ours = parser.add_argument_group("not in LLaVA's script")
    ours.add_argument("--reducer", help="token reducer in place of the checkpoint's, e.g. prumerge+")
    ours.add_argument("--vision-tower", help="vision tower in place of the checkpoint's")
    ours.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")
    ours.add_argument("--batch-tokens", type=int, metavar="N", help="bound of a batch")
    ours.add_argument("--decode-workers", type=int, default=default_decode_workers(), metavar="N")
    ours.add_argument("--overwrite", action="store_true", help="begin anew where the answers file exists")
    return parser


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Arguments from Python, where a caller leaves out what it does not know."""
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    return argparse.Namespace(**(defaults | vars(args)))


def run(args: argparse.Namespace, requests: Sequence[Request], script: str, max_new_tokens: int) -> int:
    """Answer this chunk of the requests into `--answers-file`; 1 if questions are left without an answer."""
    name = get_model_name_from_path(args.model_path)
    conv_mode = args.conv_mode
    if "plain" in name and "finetune" not in name.lower() and "mmtag" not in conv_mode:
        conv_mode += "_mmtag"  # as LLaVA's scripts do for models that saw no instructions
    if args.temperature > 0:
        print(
            f"temperature {args.temperature} samples words; benchmarks pass --temperature 0", file=sys.stderr
        )
    took = answer(
        Job(
            requests=chunk(requests, args.num_chunks, args.chunk_idx),
            model=ModelSource(
                args.model_path,
                args.model_base,
                reducer=args.reducer,
                vision_tower=args.vision_tower,
                device=args.device,
            ),
            answers=Path(args.answers_file),
            generation=Generation(max_new_tokens, args.temperature, args.top_p, args.num_beams),
            conv_mode=conv_mode,
            about=(
                ("script", script),
                ("questions", Path(args.question_file).name),
                ("chunk", f"{args.chunk_idx} of {args.num_chunks}"),
            ),
            batch_tokens=args.batch_tokens,
            decode_workers=args.decode_workers,
        ),
        workers=1,
        overwrite=args.overwrite,
    )
    print(f"{args.answers_file}: {took['answered']:,} of {took['questions']:,} questions, {as_rates(took)}")
    report_problems([f"question {one['question_id']}: {one['problem']}" for one in took["problems"]])
    return 1 if took["problems"] else 0


def main(parser: argparse.ArgumentParser, eval_model: Callable[[argparse.Namespace], int]) -> int:
    """A script's exit status: what `eval_model` returns, 2 with one sentence for bad input."""
    try:
        return eval_model(parser.parse_args())
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
