"""A training run from a command line: `python -m llava.train.train FLAGS`, or `llava train FLAGS`.

Under torchrun or deepspeed for several GPUs. The run's folder gets the weights, log.jsonl (see `llava plot`)
and run.json (all arguments, the versions, and what was decided for the user). A run that was stopped goes on
from its last complete checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed

from llava.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.data.table import image_names
from llava.errors import UserError, exit_status
from llava.mm_utils import load_image
from llava.train import save
from llava.train.arguments import Arguments, DataArguments, TrainingArguments, build_parser, parse
from llava.train.setup import Prepared, build, gathered
from llava.train.trainer import LlavaTrainer
from llava.train.visual_cache import VisualCache, digest_of, hash_files, processing, recipe_of

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


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
    main_process = training_args.process_index == 0

    def say(line: str) -> None:
        notes.append(line)
        if main_process:
            print(line, file=sys.stderr)

    for line in notes.copy():
        if main_process:
            print(line, file=sys.stderr)
    _set_up_processes(training_args)

    prepared = build(model_args, data_args, training_args, say)
    dataset = LazySupervisedDataset(
        data_args.data_path,
        prepared.tokenizer,
        prepared.llava.get_vision_tower().image_processor,
        image_folder=data_args.image_folder,
        version=model_args.version,
        image_aspect_ratio=data_args.image_aspect_ratio,
        mm_use_im_start_end=model_args.mm_use_im_start_end,
        on_bad_sample=data_args.on_bad_sample,
    )
    _say_if_images_fill_the_sequence(prepared, training_args, say)
    if data_args.visual_cache:
        dataset.load_visual = fill_visual_cache(prepared, dataset, data_args, training_args, say)

    run = Path(training_args.output_dir)
    if training_args.should_save:
        run.mkdir(parents=True, exist_ok=True)
        save.clean(run)
        write_run_file(run / RUN_FILE, arguments, notes)
    trainer = LlavaTrainer(
        prepared, training_args, dataset, DataCollatorForSupervisedDataset(prepared.tokenizer)
    )
    checkpoint = _resume_from(training_args, run, say)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_state()
    trainer.save_model()
    bad = trainer.accelerator.reduce(dataset.bad.to(training_args.device, torch.int32)).nonzero()
    if len(bad):
        rows = ", ".join(map(str, bad.flatten()[:20].tolist()))
        more = " ..." if len(bad) > 20 else ""
        say(f"unusable samples met and replaced by others: {len(bad):,} (rows {rows}{more})")
    say(f"saved in {run}")
    if training_args.should_save:
        write_run_file(run / RUN_FILE, arguments, notes)


def _set_up_processes(training: TrainingArguments) -> None:
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING, force=False)
    for noisy in ("httpx", "filelock", "PIL", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A plain `python` start on several GPUs: DataParallel cannot split lists of images.
    if training.n_gpu > 1:
        training._n_gpu = 1
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # the model touches the projector in every batch
    if training.deepspeed is not None and training.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")


def _say_if_images_fill_the_sequence(prepared: Prepared, training: TrainingArguments, say) -> None:
    llava = prepared.llava
    patches, longest = llava.get_vision_tower().num_patches, training.model_max_length
    if llava.reducer.spec == "none" and patches >= longest:
        say(
            f"warning: --model_max_length {longest} cuts off all text behind an image, which alone takes "
            f"{patches} tokens: give 2048 (LLaVA-1.5), or a --mm_token_reducer"
        )


def _resume_from(training: TrainingArguments, run: Path, say) -> Path | None:
    """The checkpoint to go on from: the one asked for, else the newest complete one of this run."""
    if (asked := training.resume_from_checkpoint) not in (None, "True", "true"):  # which is what we do anyway
        if (flaw := save.what_is_missing(Path(asked))) is not None:
            raise UserError(f"--resume_from_checkpoint {asked}: {flaw}.")
        return Path(asked)
    if training.should_save or run.is_dir():
        checkpoint = save.last_checkpoint(run, say)
        if checkpoint is not None:
            say(f"going on from {checkpoint}")
        return checkpoint
    return None


# Visual cache


def fill_visual_cache(
    prepared: Prepared,
    dataset: LazySupervisedDataset,
    data: DataArguments,
    training: TrainingArguments,
    say,
):
    """Encode every image of the data that is not in the cache yet; each process takes its share.

    Returns:
        The dataset's `load_visual`: the name of an image -> its visual tokens [K, C], float32.
    """
    llava = prepared.llava
    tower = llava.get_vision_tower()
    folder = Path(data.image_folder) if data.image_folder else Path()
    names = sorted({name for images in image_names(dataset.table) for name in images})
    share = [folder / name for name in names][training.process_index :: training.world_size]
    show = training.process_index == 0
    digests = hash_files(share, show=show)

    def on_error(file: Path, problem: str) -> None:
        if data.on_bad_sample == "error":
            raise UserError(problem)
        logger.warning("left out: %s", problem)

    with gathered(list(tower.parameters())):
        tower.to(training.device)
        cache = VisualCache(data.visual_cache, recipe_of(llava))
        process = processing(llava)
        if show:
            had = len(cache)
            if not cache.check_program(process, llava.encode_images) and had:
                say("visual cache: the program makes other tokens than before, so it is filled anew")
        _wait(training)
        cache.reload()
        for file, digest in zip(share, digests, strict=True):
            if not digest:
                on_error(file, f"{file} cannot be read")
        encoded = cache.fill(
            share,
            digests,
            process,
            llava.encode_images,
            batch_size=data.visual_cache_batch_size,
            workers=training.dataloader_num_workers,
            on_error=on_error,
            show=show,
        )
    _wait(training)
    cache.reload()
    say(f"visual cache {cache.folder}: {encoded:,} images encoded, {len(cache):,} there")
    return _CachedTokens(cache, folder)


class _CachedTokens:
    """The visual tokens of an image by its name; goes by the file's content, so they are never stale."""

    def __init__(self, cache: VisualCache, folder: Path):
        self.cache = cache
        self.folder = folder

    def __call__(self, name: str) -> torch.Tensor:
        file = self.folder / name
        entry = int(self.cache.find([digest_of(file)])[0])
        if entry < 0:
            load_image(file)  # says what is wrong with it
            raise UserError(f"{file} has changed since the visual cache was filled: start the run again")
        return self.cache[entry].float()  # a CPU's autocast does not know float16


def _wait(training: TrainingArguments) -> None:
    if training.world_size > 1:
        torch.distributed.barrier()


# What a run leaves beside its weights


def write_run_file(file: Path, arguments: Arguments, notes: list[str]) -> None:
    """run.json: everything needed to say later what was run."""
    model, data, training = arguments
    packages = ("llava", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
    content = {
        "model": dataclasses.asdict(model),
        "data": dataclasses.asdict(data),
        "training": training.to_dict(),
        "processes": training.world_size,
        "versions": {name: version for name in packages if (version := _version(name))},
        "notes": notes,
    }
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(beside, file)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
