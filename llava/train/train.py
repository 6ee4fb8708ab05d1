"""A training run from a command line: `python -m llava.train.train FLAGS`, or `llava train FLAGS`.

Under torchrun or deepspeed for several GPUs. The run's folder gets the weights, log.jsonl (see `llava plot`)
and run.json (all arguments, the versions, and what was decided for the user). A run that was stopped goes on
from its last complete checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.errors import UserError, exit_status
from llava.train.arguments import build_parser, parse


def train(attn_implementation: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run one training stage.

    Args:
        attn_implementation: attention kernel, unless the command line says; default: the hardware's best.
        argv: the command line without the program's name; default: sys.argv's.

    Raises:
        UserError: what was asked for cannot be done.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if attn_implementation is not None:
        argv = ["--attn_implementation", attn_implementation, *argv]
    notes: list[str] = []
    arguments = model_args, data_args, training_args = parse(argv, say=notes.append)

    # Only now: these take seconds to import, and a wrong flag should be answered at once.
    from llava.data import DataCollatorForSupervisedDataset
    from llava.data.table import open_table
    from llava.train import save
    from llava.train.log import write_run_file
    from llava.train.setup import build, open_dataset
    from llava.train.trainer import LlavaTrainer
    from llava.train.visual_cache import cached_tokens

    def say(line: str) -> None:
        notes.append(line)
        if training_args.process_index == 0:
            print(line, file=sys.stderr)

    if training_args.process_index == 0:
        print(*notes, sep="\n", file=sys.stderr)
    logging.basicConfig(level=logging.INFO if training_args.should_log else logging.WARNING)
    for noisy in ("httpx", "filelock", "PIL", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A plain `python` start on several GPUs: DataParallel cannot split lists of images.
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # the model touches the projector in every batch
    if training_args.deepspeed is not None and training_args.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")

    # What can be wrong with the folder and the data is found before the model is loaded.
    run = Path(training_args.output_dir)
    if training_args.should_save:
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_run_file(run, arguments, notes)
        except OSError as error:
            raise UserError(f"--output_dir {run} cannot be written to ({error.strerror}).") from error
        for left_over in run.glob(f"{save.STAGING}*"):
            shutil.rmtree(left_over, ignore_errors=True)
    if (asked := training_args.resume_from_checkpoint) in (None, "True", "true"):
        checkpoint = save.last_checkpoint(run, say)
    elif (problem := save.what_is_missing(checkpoint := Path(asked))) is not None:
        raise UserError(f"--resume_from_checkpoint {asked}: {problem}.")
    with training_args.main_process_first():  # one makes the copy, the others open it
        open_table(data_args.data_path)

    prepared = build(model_args, data_args, training_args, say)
    tower = prepared.llava.get_vision_tower()
    dataset = open_dataset(prepared, model_args, data_args, on_bad_sample=data_args.on_bad_sample)
    longest = training_args.model_max_length
    if any(reducer.name == "none" for reducer in prepared.reducers) and tower.num_patches >= longest:
        say(
            f"warning: --model_max_length {longest} cuts off all text behind an image, which alone takes "
            f"{tower.num_patches} tokens: give 2048 (LLaVA-1.5), or a --mm_token_reducer"
        )
    if data_args.visual_cache:
        dataset.load_visual = cached_tokens(prepared, dataset, data_args, training_args, say)

    collator = DataCollatorForSupervisedDataset(prepared.tokenizer)
    trainer = LlavaTrainer(prepared, training_args, dataset, collator)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_state()
    trainer.save_model()
    bad = trainer.accelerator.reduce(dataset.bad.to(training_args.device, torch.int32)).nonzero()
    if len(bad):
        rows = ", ".join(map(str, bad.flatten()[:20].tolist())) + (" ..." if len(bad) > 20 else "")
        say(f"unusable samples met and replaced by others: {len(bad):,} (rows {rows})")
    say(f"saved in {run}")
    if training_args.should_save:
        write_run_file(run, arguments, notes)


# Entry points


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`llava train`: every flag goes to the training parser, which has its own --help."""
    parser.add_argument("flags", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    flags = [flag for flag in args.flags if flag != "--"]
    if {"-h", "--help"} & set(flags):
        build_parser().print_help()
    else:
        train(argv=flags)
    return 0


def main() -> None:
    """Trains as sys.argv says, and ends the process with the status of a command."""
    sys.exit(exit_status(lambda: run(argparse.Namespace(flags=sys.argv[1:])), name="train"))


if __name__ == "__main__":
    main()
