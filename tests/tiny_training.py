"""A tiny model, a few pictures and conversations, and one call that trains on them."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_checkpoints import Family, family
from torch.utils.data import Subset

from llava.data import DataCollatorForSupervisedDataset
from llava.train.arguments import parse
from llava.train.plot import read_log
from llava.train.setup import Prepared, build, open_dataset
from llava.train.train import train
from llava.train.trainer import LlavaTrainer

FLAGS = (
    "--version v1 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False "
    "--image_aspect_ratio pad --use_cpu True --model_max_length 512 --per_device_train_batch_size 2 "
    "--logging_steps 1 --disable_tqdm True --learning_rate 1e-3"
)
STAGES = {
    "projector": "--tune_mm_mlp_adapter True",
    "lora": "--lora_enable True --lora_r 4 --lora_alpha 8 --mm_projector_lr 1e-4",
    "full": "--group_by_modality_length True",
}


@dataclass(frozen=True)
class Tiny:
    """The checkpoints, the data file and the folder of its images."""

    models: Family
    data: Path
    images: Path

    def argv(self, out: Path, flags: str = "") -> list[str]:
        return shlex.split(
            f"--model_name_or_path {self.models.base} --vision_tower {self.models.tower} "
            f"--data_path {self.data} --image_folder {self.images} --output_dir {out} {FLAGS} {flags}"
        )

    def train(self, out: Path, flags: str = "") -> list[dict]:
        """Run to the end; the log lines that carry a loss."""
        train(argv=self.argv(out, flags))
        return losses(out)


def silent(line: str) -> None:
    pass


def trainer(argv: list[str], order: list[int] | None = None) -> tuple[Prepared, LlavaTrainer]:
    """The model and the trainer of a command line, before the first step; `order`: the samples it gets."""
    model_args, data_args, training_args = parse(argv, silent)
    torch.manual_seed(0)
    prepared = build(model_args, data_args, training_args, silent)
    dataset = open_dataset(prepared, model_args, data_args)
    samples = dataset if order is None else Subset(dataset, order)
    collator = DataCollatorForSupervisedDataset(prepared.tokenizer)
    return prepared, LlavaTrainer(prepared, training_args, samples, collator)


def prepare(tiny: Tiny, out: Path, flags: str = "") -> tuple[Prepared, LlavaTrainer]:
    return trainer(tiny.argv(out, flags))


def losses(run: Path) -> list[dict]:
    return [row for row in read_log(run / "log.jsonl") if "loss" in row]


def make(root: Path) -> Tiny:
    """Six pictures, four texts without one; answers of different lengths."""
    models = family(root)
    images = root / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number in range(6):
        size = (int(random.integers(40, 90)), int(random.integers(40, 90)), 3)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(images / f"{number}.png")
        answer = " ".join(["red", "dog", "by", "the", "sea"][: 1 + number % 5])
        turns = [("human", "<image>\nWhat is it?"), ("gpt", answer), ("human", "Sure?"), ("gpt", "Yes.")]
        rows.append({"id": f"i{number}", "image": f"{number}.png", "turns": turns[: 2 if number % 2 else 4]})
    for number in range(4):
        turns = [("human", f"Say {number}."), ("gpt", f"It is {number}" + ", and so on" * number)]
        rows.append({"id": f"t{number}", "turns": turns})
    for row in rows:
        row["conversations"] = [{"from": who, "value": text} for who, text in row.pop("turns")]
    data = root / "data.json"
    data.write_text(json.dumps(rows))
    return Tiny(models, data, images)
