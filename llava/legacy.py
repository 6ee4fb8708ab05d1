"""LLaVA's names for asking a model, onto the engine and the evaluation loop.

`python -m llava.eval.model_vqa_loader`, `model_vqa`, `model_vqa_science`, `model_vqa_mmbench`, `run_llava`
and `llava.serve.cli` take the flags they always took and write the files they always wrote. Two things are
new: a killed run goes on where it was, and an answers file of another run is refused (or --overwrite).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.errors import UserError, exit_status

Asked = Iterator[tuple[str, Any, dict[str, Any]]]
"""Of each question: what the model is told, its image or None, its line in the answers file."""


# --- the four runners ---


def ask_rows(args: argparse.Namespace) -> Asked:
    from llava.eval.questions import read_questions

    for sample in read_questions(Path(args.question_file), Path(args.image_folder)):
        yield sample.text, sample.image, {"question_id": sample.id, "prompt": sample.text, "text": ""}


def ask_science(args: argparse.Namespace) -> Asked:
    from llava.eval.questions import LETTER, read_conversations, with_tag

    for sample in read_conversations(Path(args.question_file), Path(args.image_folder)):
        text = sample.text + (LETTER if args.single_pred_prompt else "")
        yield text, sample.image, {"question_id": sample.id, "prompt": with_tag(sample, text), "text": ""}


def ask_mmbench(args: argparse.Namespace) -> Asked:
    from llava.eval.benchmarks import mmbench, mmbench_cn
    from llava.eval.benchmarks.base import LETTER

    suffix = {"en": LETTER, "cn": mmbench_cn.SUFFIX}[args.lang] if args.single_pred_prompt else ""
    for sample in mmbench.load(Path(), Path(args.question_file)):
        letters = list(mmbench.OPTIONS[: len(sample.options)])
        for turn in range(len(letters) if args.all_rounds else 1):
            options = [*sample.options[turn:], *sample.options[:turn]]
            text = mmbench.question_text(sample.stem, options)
            line = {"question_id": sample.id, "round_id": turn, "prompt": text, "text": ""}
            line |= {"options": options, "option_char": letters[turn:] + letters[:turn]}
            yield text + suffix, sample.image, line


@dataclass(frozen=True)
class Runner:
    """One of LLaVA's four inference scripts."""

    name: str
    ask: Callable[[argparse.Namespace], Asked]
    flags: dict[str, dict[str, Any]]  # beside those that all of them have
    conv_mode: str = "llava_v1"
    question_file: str = "tables/question.jsonl"

    def parser(self) -> argparse.ArgumentParser:
        from llava.eval.run import default_decode_workers

        parser = argparse.ArgumentParser(prog=f"llava.eval.{self.name}", description=__doc__)
        parser.add_argument("--model-path", default="facebook/opt-350m")
        parser.add_argument("--model-base")
        parser.add_argument("--image-folder", default="")
        parser.add_argument("--question-file", default=self.question_file)
        parser.add_argument("--answers-file", default="answer.jsonl")
        parser.add_argument("--conv-mode", default=self.conv_mode)
        parser.add_argument("--num-chunks", type=int, default=1)
        parser.add_argument("--chunk-idx", type=int, default=0)
        parser.add_argument("--temperature", type=float, default=0.2, help="default: 0.2; 0 is greedy")
        parser.add_argument("--top_p", type=float)
        parser.add_argument("--num_beams", type=int, default=1)
        for name, options in self.flags.items():
            parser.add_argument(name, **options)
        ours = parser.add_argument_group("not in LLaVA's script")
        ours.add_argument("--reducer", help="token reducer in place of the checkpoint's, e.g. prumerge+")
        ours.add_argument("--vision-tower", help="vision tower in place of the checkpoint's")
        ours.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")
        ours.add_argument("--batch-tokens", type=int, metavar="N", help="bound of a batch")
        ours.add_argument("--decode-workers", type=int, default=default_decode_workers(), metavar="N")
        ours.add_argument("--overwrite", action="store_true", help="begin anew where the answers file exists")
        return parser

    def eval_model(self, args: argparse.Namespace) -> int:
        """Answer this chunk of the questions into `--answers-file`; 1 if some are left without an answer."""
        from llava.engine import ModelSource, Request
        from llava.eval.loop import Job, answer
        from llava.eval.run import as_rates, chunk, with_image
        from llava.eval.score import report_problems

        args = complete(self.parser(), args)
        if args.temperature > 0:
            note = f"temperature {args.temperature} samples words; benchmarks pass --temperature 0"
            print(note, file=sys.stderr)
        how = {name: getattr(args, name) for name in ("temperature", "top_p", "num_beams")}
        how |= {"max_new_tokens": getattr(args, "max_new_tokens", 1024), "seed": 0}
        requests, lines = [], []
        for text, image, line in chunk(list(self.ask(args)), args.num_chunks, args.chunk_idx):
            requests.append(Request(id=len(lines), **with_image(text, image), **how))
            lines.append(line)
        model = ModelSource(
            args.model_path,
            args.model_base,
            conv_mode=args.conv_mode,
            reducer=args.reducer,
            vision_tower=args.vision_tower,
            device=args.device,
        )
        if "plain" in model.name and "finetune" not in model.name.lower() and "mmtag" not in args.conv_mode:
            # As LLaVA's scripts do for models that saw no instructions.
            model = replace(model, conv_mode=args.conv_mode + "_mmtag")
        job = Job(
            requests=requests,
            lines=lines,
            model=model,
            answers=Path(args.answers_file),
            about={
                "script": self.name,
                "questions": Path(args.question_file).name,
                "chunk": f"{args.chunk_idx} of {args.num_chunks}",
            },
            batch_tokens=args.batch_tokens,
            decode_workers=args.decode_workers,
        )
        took = answer(job, workers=1, overwrite=args.overwrite)
        rates = as_rates(took)
        print(f"{args.answers_file}: {took['answered']:,} of {took['questions']:,} questions, {rates}")
        report_problems([f"question {one['question_id']}: {one['problem']}" for one in took["problems"]])
        return 1 if took["problems"] else 0

    def main(self, argv: Sequence[str] | None = None) -> int:
        args = self.parser().parse_args(argv)
        return exit_status(lambda: self.eval_model(args), name=f"llava.eval.{self.name}")


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Arguments from Python, where a caller leaves out what it does not know."""
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    return argparse.Namespace(**(defaults | vars(args)))


LETTER_FLAG = {"--single-pred-prompt": {"action": "store_true", "help": "ask for the option's letter"}}
MODEL_VQA = Runner("model_vqa", ask_rows, {})
MODEL_VQA_LOADER = Runner("model_vqa_loader", ask_rows, {"--max_new_tokens": {"type": int, "default": 128}})
MODEL_VQA_SCIENCE = Runner(
    "model_vqa_science",
    ask_science,
    {"--answer-prompter": {"action": "store_true", "help": "without effect, as in LLaVA"}, **LETTER_FLAG},
    conv_mode="llava_v0",
    question_file="tables/question.json",
)
MODEL_VQA_MMBENCH = Runner(
    "model_vqa_mmbench",
    ask_mmbench,
    {
        "--all-rounds": {"action": "store_true", "help": "ask with the options in every rotation"},
        "--lang": {"default": "en", "choices": ("en", "cn")},
        **LETTER_FLAG,
    },
)


# --- run_llava: one question about one or more pictures ---


def run_llava_parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="llava.eval.run_llava", description=__doc__)
    flags.add_argument("--model-path", default="facebook/opt-350m")
    flags.add_argument("--model-base")
    flags.add_argument("--image-file", required=True, help="path or URL; several are joined by --sep")
    flags.add_argument("--query", required=True)
    flags.add_argument("--conv-mode")
    flags.add_argument("--sep", default=",")
    flags.add_argument("--temperature", type=float, default=0.2)
    flags.add_argument("--top_p", type=float)
    flags.add_argument("--num_beams", type=int, default=1)
    flags.add_argument("--max_new_tokens", type=int, default=512)
    flags.add_argument("--reducer", help="token reducer in place of the checkpoint's, e.g. prumerge+")
    return flags


def run_llava(args: argparse.Namespace) -> int:
    """Prints the answer. Programs call it with an object that has model_path, model_base, query, image_file
    and, if they like, conv_mode, sep, temperature, top_p, num_beams, max_new_tokens, reducer."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
    from llava.conversation import conv_mode_for
    from llava.engine import ModelSource, Request
    from llava.mm_utils import get_model_name_from_path

    args = complete(run_llava_parser(), args)
    conv_mode = args.conv_mode or conv_mode_for(get_model_name_from_path(args.model_path))
    source = ModelSource(args.model_path, args.model_base, conv_mode=conv_mode, reducer=args.reducer)
    request = Request(
        text=args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN),
        images=args.image_file.split(args.sep),
        **{name: getattr(args, name) for name in ("temperature", "top_p", "num_beams", "max_new_tokens")},
    )
    (answer,) = source.load().answer([request])
    if answer.problem:
        raise UserError(answer.problem)
    print(answer.text)
    return 0


def run_llava_main(argv: Sequence[str] | None = None) -> int:
    args = run_llava_parser().parse_args(argv)
    return exit_status(lambda: run_llava(args), name="llava.eval.run_llava")


# --- llava.serve.cli ---


def serve_cli(argv: Sequence[str] | None = None) -> int:
    """`llava chat` with LLaVA's temperature of 0.2 and its way to infer the template."""
    from llava.conversation import conv_mode_for
    from llava.mm_utils import get_model_name_from_path
    from llava.serve import chat

    parser = argparse.ArgumentParser(prog="llava.serve.cli", description=serve_cli.__doc__)
    chat.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(temperature=0.2)
    args = parser.parse_args(argv)
    args.conv_mode = args.conv_mode or conv_mode_for(get_model_name_from_path(args.model_path))
    return exit_status(lambda: chat.run(args), name="llava.serve.cli", debug=args.debug)
