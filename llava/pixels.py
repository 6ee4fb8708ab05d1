"""From image files to the pixels the vision tower takes, in worker processes ahead of who needs them."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava.errors import UserError
from llava.mm_utils import load_image, load_image_from_base64, process_images

Source = Path | str | Image.Image
"""A file; a path, an http(s) address or a `data:` URL with base64; a picture."""


@dataclass(frozen=True)
class Pixels:
    """A processed image: [3, S, S], or [tiles, 3, S, S] for anyres, as numpy for the way between processes;
    its (width, height)."""

    values: np.ndarray
    size: tuple[int, int]


def decode(image: Source, image_processor: Any, config: Any) -> Pixels | str:
    """The processed image, or one sentence about what is wrong with it."""
    try:
        if isinstance(image, Image.Image):
            picture = image
        elif isinstance(image, str) and image.startswith("data:"):
            picture = load_image_from_base64(image.partition(",")[2])
        else:
            picture = load_image(image)
        return Pixels(process_images([picture], image_processor, config)[0].numpy(), picture.size)
    except UserError as error:
        return str(error)


class Decoding(Dataset):
    """Item n is `decode` of image n."""

    def __init__(self, images: Sequence[Source], image_processor: Any, config: Any):
        self.images, self.image_processor, self.config = images, image_processor, config

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Pixels | str:
        return decode(self.images[number], self.image_processor, self.config)


def in_workers(dataset: Dataset, workers: int) -> DataLoader:
    """dataset[0], dataset[1], ... made in processes, up to eight a process ahead of who takes them."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=die_with_parent,
    )


def _unchanged(item: Any) -> Any:
    return item


def die_with_parent(worker: int = 0) -> None:
    """For a process that another one started: end when that one is killed.

    A decoder would else wait for ever for someone to read what it has decoded.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
