"""Samples and batches for training.

A sample is tokenised and its images opened when it is asked for, in the loader's worker. Samples without an
image carry none: the model takes batches with fewer images than rows, so nothing stands in for them.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.table import open_table
from llava.data.text import encode_conversation
from llava.errors import UserError
from llava.mm_utils import load_image, process_images
from llava.reducers import Reducer

logger = logging.getLogger(__name__)

ROWS_PER_MAPPING = 256
"""Each row read brings some ten pieces of 64 KiB of the mapped file into the process; without renewal the
whole file would in time count as every worker's memory. Mapping anew after so many rows costs little beside
tokenising them and opening their images."""

SKIPS_SAID = 5
"""So many skipped samples are logged with their reason; the run's last line counts all of them."""


class BadSample(UserError):
    """A sample that cannot be trained on; the message names the file, the row and the reason."""

    def __init__(self, message: str):
        # What a loader's worker raises comes out of torch as a whole traceback, our sentence last.
        super().__init__(message.rpartition("BadSample: ")[2].strip())


class LazySupervisedDataset(Dataset):
    """The samples of a data file.

    data_path: JSON list, JSON lines or parquet, see `llava.data.table`.
    image_folder: what the names in `image` are relative to.
    image_processor: the tower's. Needed for rows with images unless `load_visual` is given.
    version, mm_use_im_start_end: see `encode_conversation`.
    image_aspect_ratio: "pad" or "square", see `process_images`.
    load_visual: takes a name in `image`, and a reducer or None, and returns that image's cached visual tokens
        [K, mm_hidden]; images are then not opened.
    on_bad_sample: "error" raises `BadSample`; "skip" gives the next good sample of the same kind (with or
        without image) in its place and marks it in `bad`, a bool per row.

    A sample is `input_ids`, `labels` (int64 [n]), and with images one of `images` (list of float32 [3, S, S])
    and `visual_tokens` (list of [K, mm_hidden]), in the order of the placeholders in `input_ids`. It is asked
    for by its row, or by (row, reducer): then `reducers` has that reducer for each of `images`.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        image_folder: str | Path | None = None,
        version: str = "v1",
        image_aspect_ratio: str = "square",
        mm_use_im_start_end: bool = False,
        load_visual: Callable[[str, Reducer | None], torch.Tensor] | None = None,
        on_bad_sample: str = "error",
    ):
        self.data_path = Path(data_path)
        self.table = open_table(data_path)
        self._rows_read = 0
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_folder = Path(image_folder) if image_folder else None
        self.version = version
        self.image_aspect_ratio = image_aspect_ratio
        self.mm_use_im_start_end = mm_use_im_start_end
        self.load_visual = load_visual
        self.on_bad_sample = on_bad_sample
        self._words = torch.tensor(self.table.data.column("words").to_numpy())
        # Shared memory: workers mark the rows they skip, the main process reads them.
        self.bad = torch.zeros(len(self.table), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample, negative for those without an image."""
        return self._words.tolist()

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, and 128 for the image of those that have one."""
        return (self._words.abs() + 128 * (self._words > 0)).tolist()

    def __getitem__(self, key: int | tuple[int, Reducer]) -> dict[str, Any]:
        index, reducer = key if isinstance(key, tuple) else (key, None)
        if self.on_bad_sample == "error":
            return self.sample(index, reducer)
        kind = self._words[index] > 0
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            if self.bad[candidate] or (self._words[candidate] > 0) != kind:
                continue
            try:
                return self.sample(candidate, reducer)
            except BadSample as error:
                self.bad[candidate] = True
                if self.bad.sum() <= SKIPS_SAID:
                    logger.warning("skipped: %s", error)
        raise UserError(
            f"{self.data_path}: no sample of the kind of row {index} is usable; `llava doctor data` says why."
        )

    def sample(self, index: int, reducer: Reducer | None = None) -> dict[str, Any]:
        """Sample `index` itself, whatever `on_bad_sample` says. Raises BadSample."""
        row = self.row(index)
        try:
            return self._encode(row, reducer)
        except UserError as error:
            raise BadSample(f"{self.data_path} row {index} (id {row['id']}): {error}") from None

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` of the table, see `llava.data.table.table_row`."""
        self._rows_read += 1
        if self._rows_read % ROWS_PER_MAPPING == 0:
            self.table = type(self.table).from_file(self.table.cache_files[0]["filename"])
        return self.table[index]

    def _encode(self, row: dict[str, Any], reducer: Reducer | None) -> dict[str, Any]:
        if row["problem"]:
            raise UserError(f"{row['problem']}.")
        names = row["image"]
        input_ids, labels = encode_conversation(
            row["conversations"],
            self.tokenizer,
            self.version,
            has_image=bool(names),
            mm_use_im_start_end=self.mm_use_im_start_end,
            several_images=len(names) > 1,
        )
        placeholders = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        check_placeholders(row["conversations"], len(names), placeholders)
        sample: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if not names:
            return sample
        if self.load_visual is not None:
            sample["visual_tokens"] = [self.load_visual(name, reducer) for name in names]
            return sample
        sample["images"] = [self._pixels(name) for name in names]
        if reducer is not None:
            sample["reducers"] = [reducer] * len(names)
        return sample

    def _pixels(self, name: str) -> torch.Tensor:
        if self.image_processor is None:
            raise ValueError("rows with images need an image_processor (or load_visual)")
        image = load_image(self.image_folder / name if self.image_folder else name)
        config = SimpleNamespace(image_aspect_ratio=self.image_aspect_ratio)
        return process_images([image], self.image_processor, config)[0]


def check_placeholders(turns: Sequence[dict[str, str]], images: int, placeholders: int) -> None:
    """Refuse a sample whose `<image>` do not match its images: later images of the batch would be shifted.

    `placeholders` counts those left in the ids (several in one turn become one for a single image).
    """
    if images == 0:
        placeholders = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if placeholders != images:
        raise UserError(f"it has images: {images}, {DEFAULT_IMAGE_TOKEN} in its text: {placeholders}.")


class DataCollatorForSupervisedDataset:
    """Samples as one batch: ids padded on the right with the pad token, labels with IGNORE_INDEX, both cut at
    `max_length` (default: the tokenizer's model_max_length).

    `attention_mask` is True up to each sample's length, not where ids differ from the pad id: the pad token
    is often `<unk>`, which may stand in a text. `images` with `reducers`, and `visual_tokens`, are lists over
    the batch in the order of the placeholders; those whose placeholder was cut off are left out, and a batch
    without any has no such key.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None):
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token; load it with llava's load_tokenizer.")
        self.pad_token_id = tokenizer.pad_token_id
        self.max_length = max_length or tokenizer.model_max_length

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # Tokenizers without a limit say 10**30, which no tensor takes as an index.
        end = min(self.max_length, max(len(sample["input_ids"]) for sample in samples))
        ids = [sample["input_ids"][:end] for sample in samples]
        labels = [sample["labels"][:end] for sample in samples]
        lengths = torch.tensor([len(one) for one in ids])
        pad = torch.nn.utils.rnn.pad_sequence
        batch: dict[str, Any] = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        }
        for key in ("images", "reducers", "visual_tokens"):
            visuals = [
                visual
                for sample, one in zip(samples, ids, strict=True)
                for visual in sample.get(key, [])[: int((one == IMAGE_TOKEN_INDEX).sum())]
            ]
            if visuals:
                batch[key] = visuals
        return batch
