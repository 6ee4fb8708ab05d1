"""How much of a LoRA step visual token reduction saves, beside what it could save by arithmetic.

    python scripts/bench_train_step.py [--rounds 5] [--reducers none prumerge+ prumerge] [--json out.json]

The small model (checkpoints/mini-base, made by `llava mini prepare`), or `--shape 7b`, on composed
scenes (some 160 text tokens each), through the real trainer: forward, backward, clipping, AdamW; the same
texts for every reducer, visual tokens made before, so the tower takes no part. The reducers take turns in
each round, so that a busy machine slows all of them alike; times are medians. On a CPU one thread's
processor time is measured, which is what a wall clock shows on an idle machine. FLOPs are counted by torch
over the same steps (attention as products of all with all).

achieved = (1 - time / time with every token) / (1 - FLOPs / FLOPs with every token)
cache = what `--visual_cache` saves of a step in which tower and reducer run
"""

import argparse
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from llava import hardware
from llava.analysis.random_model import build_model
from llava.analysis.shapes import SHAPES, Shape
from llava.analysis.stopwatch import CLOCKS, Stopwatch
from llava.analysis.tables import render
from llava.data import DataCollatorForSupervisedDataset
from llava.files import write_json
from llava.mini.world import World, generate
from llava.train.arguments import parse
from llava.train.setup import build, open_dataset
from llava.train.trainer import LlavaTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", default="checkpoints/mini-base", help="language model, vision_tower/ inside"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, help="a language model with random weights; 7b: 14 GB on disk"
    )
    parser.add_argument("--version", default="smollm2", help="conversation template")
    parser.add_argument("--reducers", nargs="+", default=["none", "prumerge+", "prumerge"])
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per reducer")
    parser.add_argument("--lora_r", type=int, default=32)
    parser.add_argument("--precision", default="auto", help="as for `llava train`")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, Path(folder))
        device = trainer.args.device
        if device.type == "cpu":
            torch.set_num_threads(1)
        batches, pixels = {}, {}
        for spec in args.reducers:
            batches[spec], pixels[spec] = make_batch(trainer, spec, args.batch)
    times: dict[str, list[float]] = {spec: [] for spec in batches}
    tower_times: dict[str, list[float]] = {spec: [] for spec in batches}
    flops = {spec: count_flops(trainer, batch) for spec, batch in batches.items()}  # warms up, too
    llava = trainer.prepared.llava
    peaks: dict[str, int | None] = dict.fromkeys(batches)
    for _ in range(args.rounds):
        for spec, batch in batches.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times[spec].append(timed(partial(step, trainer, batch), device))
            if device.type == "cuda":
                peaks[spec] = torch.cuda.max_memory_allocated(device)
            llava.set_reducer(spec)
            tower_times[spec].append(timed(partial(llava.encode_images, pixels[spec]), device))
    report(trainer, batches, times, tower_times, flops, peaks, args.json)


def make_trainer(args: argparse.Namespace, folder: Path) -> LlavaTrainer:
    """Everything a LoRA run has, with 64 scenes to choose samples from."""
    generate(World("train", edition=2), 64, folder / "data")
    language = random_weights(args.shape, args.base, folder / "language") if args.shape else args.base
    flags = (
        f"--model_name_or_path {language} --version {args.version} --vision_tower {args.base}/vision_tower "
        f"--data_path {folder}/data/conversations.json --image_folder {folder}/data "
        f"--output_dir {folder}/run "
        "--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False "
        f"--image_aspect_ratio pad --lora_enable True --lora_r {args.lora_r} --lora_dropout 0 "
        f"--precision {args.precision} --report_to none --model_max_length 2048 "
        f"--per_device_train_batch_size {args.batch}"
    )
    model_args, data_args, training_args = parse(shlex.split(flags))
    torch.manual_seed(0)
    prepared = build(model_args, data_args, training_args, print)
    dataset = open_dataset(prepared, model_args, data_args)
    trainer = LlavaTrainer(
        prepared, training_args, dataset, DataCollatorForSupervisedDataset(prepared.tokenizer)
    )
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def random_weights(shape: str, base: str, folder: Path) -> Path:
    """A LLaVA of `shape` on the small tower, with `base`'s vocabulary, in `folder`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "vision_tower"))
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    whole = Shape(SHAPES["mini"].tower, replace(SHAPES[shape].language, vocab_size=vocabulary))
    build_model(whole, hardware.plan()).save_pretrained(folder)
    return folder


def make_batch(trainer: LlavaTrainer, spec: str, size: int) -> tuple[dict[str, Any], torch.Tensor]:
    """The first samples, with the visual tokens `spec` leaves of their images; and these images' pixels."""
    llava = trainer.prepared.llava
    llava.set_reducer(spec)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(size)])
    pixels = torch.stack(batch.pop("images")).to(llava.device)
    batch["visual_tokens"] = [tokens.float() for tokens in llava.encode_images(pixels)]
    return batch, pixels


def step(trainer: LlavaTrainer, batch: dict[str, Any]) -> None:
    trainer.training_step(trainer.model, dict(batch))
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def count_flops(trainer: LlavaTrainer, batch: dict[str, Any]) -> int:
    # A CPU's fused attention is not counted, products are; a GPU's is counted, and products may not fit.
    plain = sdpa_kernel(SDPBackend.MATH) if trainer.args.device.type == "cpu" else nullcontext()
    with plain, FlopCounterMode(display=False) as counter:
        step(trainer, batch)
    return counter.get_total_flops()


def timed(work: Callable[[], object], device: torch.device) -> float:
    watch = Stopwatch(device, CLOCKS["cpu" if device.type == "cpu" else "wall"])
    start = watch.now()
    work()
    return watch.now() - start


def report(
    trainer: LlavaTrainer,
    batches: dict[str, dict[str, Any]],
    times: dict[str, list[float]],
    tower_times: dict[str, list[float]],
    flops: dict[str, int],
    peaks: dict[str, int | None],
    out: Path | None,
) -> None:
    first, *_ = batches
    rows: dict[str, dict[str, Any]] = {}
    for spec, batch in batches.items():
        seconds = statistics.median(times[spec])
        visual = [len(tokens) for tokens in batch["visual_tokens"]]
        row = {
            "visual_tokens_per_image": sum(visual) / len(visual),
            "text_tokens": int(batch["attention_mask"].sum()) - len(visual),
            "seconds": seconds,
            "tower_seconds": (tower := statistics.median(tower_times[spec])),
            "saved_by_cache": tower / (seconds + tower),
            "teraflop": flops[spec] / 1e12,
            "gigaflop_per_second": flops[spec] / seconds / 1e9,
            "peak_bytes": peaks[spec],
        }
        if spec != first:
            row["saved"] = 1 - seconds / rows[first]["seconds"]
            row["saved_by_flops"] = 1 - flops[spec] / flops[first]
            row["achieved"] = row["saved"] / row["saved_by_flops"]
        rows[spec] = row
    size = len(batches[first]["visual_tokens"])
    print(
        f"LoRA step, {size} samples, {rows[first]['text_tokens']} text tokens in all, "
        f"{trainer.prepared.llava.dtype}, {hardware.device_name(trainer.args.device)}"
    )
    header = ["reducer", "tok/image", "s/step", "tower s", "cache", "TFLOP", "GFLOP/s", "peak GB"]
    header += ["saved", "by FLOPs", "achieved"]
    lines = [
        [
            spec,
            f"{row['visual_tokens_per_image']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['tower_seconds']:.2f}",
            f"{row['saved_by_cache']:.1%}",
            f"{row['teraflop']:.3f}",
            f"{row['gigaflop_per_second']:.1f}",
            f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "",
            *(
                [f"{row['saved']:.1%}", f"{row['saved_by_flops']:.1%}", f"{row['achieved']:.2f}"]
                if spec != first
                else ["", "", ""]
            ),
        ]
        for spec, row in rows.items()
    ]
    print(render(header, lines))
    if out is not None:
        write_json(out, {"device": hardware.device_name(trainer.args.device), "rows": rows})


if __name__ == "__main__":
    main()
