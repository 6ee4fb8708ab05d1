"""LLaVA's scripts under their old names, with their flags and their files, on the code of this package.

- `python -m llava.eval.model_vqa_loader`, `model_vqa`, `model_vqa_science`, `model_vqa_mmbench` ask the
  questions of a file. New: a killed run goes on where it was, and an answers file of another run is refused.
- `llava.eval.run_llava` asks one question, `llava.serve.cli` is `llava chat`.
- `llava/eval/eval_pope.py`, `eval_textvqa.py`, `eval_science_qa.py` and `scripts/convert_*.py` score and
  convert answers. New: they join by id, and answers that are incomplete, duplicate, torn or unknown are
  named, nothing is written, and the status is 1.

Each function here returns an exit status.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.errors import UserError, exit_status
from llava.eval.answers import Row, read_answers
from llava.eval.benchmarks import (
    gqa,
    mm_vet,
    mmbench,
    mmbench_cn,
    pope,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqav2,
)
from llava.eval.benchmarks.base import Benchmark
from llava.eval.questions import LETTER, LETTERS, Sample, read_conversations, read_questions, with_tag
from llava.eval.run import chunk, default_decode_workers, tell, with_image
from llava.eval.score import as_table, report_problems
from llava.eval.submit import upload
from llava.files import write_text

Asked = Iterator[tuple[str, Any, dict[str, Any]]]
"""Of each question: what the model is told, its image or None, its line in the answers file."""


# --- the four runners ---


def ask_rows(args: argparse.Namespace) -> Asked:
    for sample in read_questions(Path(args.question_file), Path(args.image_folder)):
        yield sample.text, sample.image, {"question_id": sample.id, "prompt": sample.text, "text": ""}


def ask_science(args: argparse.Namespace) -> Asked:
    for sample in read_conversations(Path(args.question_file), Path(args.image_folder)):
        text = sample.text + (LETTER if args.single_pred_prompt else "")
        yield text, sample.image, {"question_id": sample.id, "prompt": with_tag(sample, text), "text": ""}


def ask_mmbench(args: argparse.Namespace) -> Asked:
    suffix = {"en": LETTER, "cn": mmbench_cn.SUFFIX}[args.lang] if args.single_pred_prompt else ""
    for sample in mmbench.load(Path(), Path(args.question_file)):
        letters = list(mmbench.OPTIONS[: len(sample.options)])
        for turn in range(len(letters) if args.all_rounds else 1):
            options = [*sample.options[turn:], *sample.options[:turn]]
            text = mmbench.question_text(sample.stem, options)
            line: dict[str, Any] = {"question_id": sample.id, "round_id": turn, "prompt": text, "text": ""}
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

        args = complete(self.parser(), args)
        if args.temperature > 0:
            note = f"temperature {args.temperature} samples words; benchmarks pass --temperature 0"
            print(note, file=sys.stderr)
        how = {name: getattr(args, name) for name in ("temperature", "top_p", "num_beams")}
        how |= {"max_new_tokens": getattr(args, "max_new_tokens", 1024), "seed": 0}
        requests: list[Request] = []
        lines: list[dict[str, Any]] = []
        for text, image, line in chunk(list(self.ask(args)), args.num_chunks, args.chunk_idx):
            requests.append(Request(id=len(lines), **with_image(text, image), **how))
            lines.append(line)
        model = ModelSource.of(args)
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
        return tell(job.answers, answer(job, workers=1, overwrite=args.overwrite))

    def main(self) -> int:
        return self.eval_model(self.parser().parse_args())


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
    args.conv_mode = args.conv_mode or conv_mode_for(get_model_name_from_path(args.model_path))
    request = Request(
        text=args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN),
        images=args.image_file.split(args.sep),
        **{name: getattr(args, name) for name in ("temperature", "top_p", "num_beams", "max_new_tokens")},
    )
    (answer,) = ModelSource.of(args).load().answer([request])
    if answer.problem:
        raise UserError(answer.problem)
    print(answer.text)
    return 0


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
    if args.model_path:
        args.conv_mode = args.conv_mode or conv_mode_for(get_model_name_from_path(args.model_path))
    return exit_status(lambda: chat.run(args), name="llava.serve.cli", debug=args.debug)


# --- scoring and converting ---


def eval_pope(argv: Sequence[str] | None = None) -> int:
    """POPE's figures category by category."""
    args = parse(argv, "--annotation-dir", "--question-file", "--result-file")
    samples = pope.load(Path(), Path(args.question_file), Path(args.annotation_dir))
    rows = read_joined(pope.BENCHMARK, samples, args.result_file)
    if rows is None:
        return 1
    figures = pope.BENCHMARK.score(samples, [row.text for row in rows])["metrics"]["by_category"]
    for category in ("adversarial", "popular", "random"):
        one = figures[category]
        print(f"Category: {category}, # samples: {one['n']:.0f}")
        print("TP\tFP\tTN\tFN\t")
        print("\t".join(f"{one[cell]:.0f}" for cell in ("TP", "FP", "TN", "FN")))
        print(f"Accuracy: {one['accuracy']}\nPrecision: {one['precision']}\nRecall: {one['recall']}")
        print(f"F1 score: {one['f1']}\nYes ratio: {one['yes_ratio']}")
        print(", ".join(f"{one[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")))
        print("====================================")
    return 0


def eval_textvqa(argv: Sequence[str] | None = None) -> int:
    """TextVQA accuracy of an answers file, or of each in a folder."""
    args = parse(argv, "--annotation-file", result_file="", result_dir="")
    if bool(args.result_file) == bool(args.result_dir):
        raise UserError("give --result-file FILE or --result-dir FOLDER.")
    samples = textvqa.read_labels(Path(args.annotation_file), Path())
    status = 0
    for file in [args.result_file] if args.result_file else sorted(Path(args.result_dir).glob("*.jsonl")):
        print(Path(file).stem)
        rows = read_joined(textvqa.BENCHMARK, samples, file)
        if rows is None:
            status = 1
            continue
        figures = textvqa.BENCHMARK.score(samples, [row.text for row in rows])["metrics"]
        print(f"Samples: {len(rows)}\nAccuracy: {figures['accuracy']:.2f}%\n")
    return status


def eval_science_qa(argv: Sequence[str] | None = None) -> int:
    """ScienceQA accuracy. `--output-file` gets every question with its parsed answer, `--output-result` the
    summary. Which questions have a picture is read from problems.json."""
    flags = ("--base-dir", "--result-file", "--output-file", "--output-result")
    args = parse(argv, *flags, split="test", options="")  # the options are always A to E
    samples = scienceqa.read_labels(Path(args.base_dir), args.split)
    rows = read_joined(scienceqa.BENCHMARK, samples, args.result_file)
    if rows is None:
        return 1
    metrics = scienceqa.BENCHMARK.score(samples, [row.text for row in rows])["metrics"]
    details: dict[str, list[dict]] = {"correct": [], "incorrect": []}
    parsed: dict[str | int, int] = {}
    for row, sample in zip(rows, samples, strict=True):
        right, choices, has_image = sample.reference
        letter = scienceqa.read_answer(row.text)
        index = LETTERS.index(letter) if letter else -1
        parsed[sample.id] = index if index < choices else -1
        details["correct" if index == right else "incorrect"].append(
            {
                "question_id": sample.id,
                "parsed_ans": letter or "FAILED",
                "ground_truth": LETTERS[right],
                "question": row.prompt,
                "pred": row.text,
                "is_multimodal": has_image,
            }
        )
    summary = {
        "acc": metrics["accuracy"],
        "correct": len(details["correct"]),
        "count": len(rows),
        "results": parsed,
        "outputs": {sample.id: row.text for sample, row in zip(samples, rows, strict=True)},
    }
    images = int(metrics["img_n"])
    image_accuracy = "-" if not images else f"{metrics['img_accuracy']:.2f}%"
    print(
        f"Total: {summary['count']}, Correct: {summary['correct']}, Accuracy: {summary['acc']:.2f}%, "
        f"IMG-Accuracy: {image_accuracy} ({metrics['img_right']:.0f} of {images})"
    )
    write_text(args.output_file, json.dumps(details, indent=2))
    write_text(args.output_result, json.dumps(summary, indent=2))
    return 0


def vqav2_for_submission(argv: Sequence[str] | None = None) -> int:
    """DIR/answers/SPLIT/CKPT/merge.jsonl to DIR/answers_upload/SPLIT/CKPT.json."""
    args = parse(argv, "--ckpt", "--split", dir="./playground/data/eval/vqav2")
    folder = Path(args.dir)
    source = folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    out = folder / "answers_upload" / args.split / f"{args.ckpt}.json"
    samples, listed = read_questions(folder / f"{args.split}.jsonl", folder), folder / vqav2.TEST
    others = vqav2.optional(folder, samples, listed)
    return convert(vqav2.BENCHMARK, source, out, samples, others, listed)


def vizwiz_for_submission(argv: Sequence[str] | None = None) -> int:
    """Answers to the list the VizWiz server takes."""
    args = parse(argv, "--annotation-file", "--result-file", "--result-upload-file")
    file = Path(args.annotation_file)
    samples = read_questions(file)
    return convert(vizwiz.BENCHMARK, args.result_file, args.result_upload_file, samples, (), file)


def mmbench_for_submission(argv: Sequence[str] | None = None) -> int:
    """RESULT_DIR/EXPERIMENT.jsonl to UPLOAD_DIR/EXPERIMENT.xlsx."""
    args = parse(argv, "--annotation-file", "--result-dir", "--upload-dir", "--experiment")
    table = Path(args.annotation_file)
    source = Path(args.result_dir) / f"{args.experiment}.jsonl"
    out = Path(args.upload_dir) / f"{args.experiment}.xlsx"
    return convert(mmbench.BENCHMARK, source, out, mmbench.load(Path(), table), (), table)


def seed_for_submission(argv: Sequence[str] | None = None) -> int:
    """SEED-Bench answers to the leaderboard's file, and their accuracy."""
    args = parse(argv, "--annotation-file", "--result-file", "--result-upload-file")
    samples = seed.read_labels(Path(args.annotation_file))
    status = convert(seed.BENCHMARK, args.result_file, args.result_upload_file, samples)
    if status == 0:
        rows = read_joined(seed.BENCHMARK, samples, args.result_file)
        print("\n".join(as_table(seed.BENCHMARK.score(samples, [row.text for row in rows])["metrics"])))
    return status


def gqa_for_eval(argv: Sequence[str] | None = None) -> int:
    """Answers to the predictions file of the official GQA script."""
    args = parse(argv, "--src", "--dst")
    return convert(gqa.BENCHMARK, args.src, args.dst)


def mmvet_for_eval(argv: Sequence[str] | None = None) -> int:
    """Answers to the file the MM-Vet notebook grades."""
    args = parse(argv, "--src", "--dst")
    return convert(mm_vet.BENCHMARK, args.src, args.dst)


def parse(argv: Sequence[str] | None, *required: str, **defaults: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in required:
        parser.add_argument(flag, required=True)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default)
    return parser.parse_args(argv)


def read_joined(benchmark: Benchmark, samples: Sequence[Sample], file: str | Path) -> list[Row] | None:
    """The answer to each question; None where something is wrong, which is printed."""
    rows, problems = read_answers([Path(file)])
    joined, wrong = benchmark.join(samples, rows)
    report_problems(problems + wrong)
    return None if problems + wrong else joined


def convert(
    benchmark: Benchmark,
    source: str | Path,
    out: str | Path,
    samples: Sequence[Sample] | None = None,
    others: Sequence[Sample] = (),
    *questions: Path,
) -> int:
    """Answers of `source` to `out`. Without `samples` nobody knows what was asked: then only torn lines and
    duplicates are found. `questions`: what `benchmark.write` reads in place of the benchmark's own file."""
    rows, problems = read_answers([Path(source)])
    if samples is None:
        samples = [Sample(number, "", None, number, "") for number in dict.fromkeys(x.id for x in rows)]

    def write(answers: Mapping[str, str]) -> None:
        benchmark.write(Path(out), None, answers, *questions)

    return upload(benchmark, (rows, problems), samples, others, Path(out), write)


def script(function: Callable[[], int]) -> None:
    """The whole body of a script."""
    sys.exit(exit_status(function, name=Path(sys.argv[0]).stem))
