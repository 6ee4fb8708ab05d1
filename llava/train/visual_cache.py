"""Visual tokens kept on disk: tower and reducer are frozen, so each image needs them only once.

A cache folder has one subfolder per way of making tokens (tower's weights, layer, reducer and its program,
preprocessing, dtype), and in it entries by the content of the image file. So nothing in it can be stale: a
changed image, tower, reducer or preprocessing is another key.

On disk: safetensors files of some hundred images, each with `tokens` (float16 [rows, C], image after image),
`digests` (uint8 [images, 16], of the image files) and `lengths` (int64 [images], rows of each). A file
appears whole, by a rename; a killed process loses what it had not written yet. Several processes may fill
one folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava.data.table import image_names
from llava.errors import UserError
from llava.files import replacing_file, write_json
from llava.mm_utils import load_image, process_images
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.reducers import Reducer
from llava.train.setup import Prepared, gathered

if TYPE_CHECKING:
    from llava.data import LazySupervisedDataset
    from llava.train.arguments import DataArguments, TrainingArguments

logger = logging.getLogger(__name__)

ROWS_PER_FILE = 1 << 15
"""Tokens after which a file is written: 64 MiB for CLIP-L, 57 images with every token or 450 with 73."""


def recipe_of(llava: LlavaLlamaForCausalLM) -> dict[str, Any]:
    """All that decides what tokens an image becomes, as the model is set up now."""
    tower = llava.get_vision_tower()
    source = inspect.getsource(sys.modules[type(llava.reducer).__module__])
    weights = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return {
        "tower": weights.hexdigest(),
        "select_layer": tower.select_layer,
        "select_feature": tower.select_feature,
        "reducer": llava.reducer.spec,
        "program": hashlib.sha256(source.encode()).hexdigest(),
        "processor": tower.image_processor.to_dict(),
        "aspect": llava.config.image_aspect_ratio,
        "pinpoints": llava.config.image_grid_pinpoints,
        "dtype": str(tower.dtype),
    }


def digest_of(file: Path) -> bytes:
    """The key of an image file: 128 bits of its content's SHA-256. b"" if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).digest()[:16]
    except OSError:
        return b""


class VisualCache:
    """The entries of one recipe. `cache[digest]` is a float16 tensor [K, C]; KeyError where there is none."""

    def __init__(self, folder: str | Path, recipe: dict[str, Any]):
        content = json.dumps(recipe, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(content.encode()).hexdigest()[:16]
        write_json(self.folder / "recipe.json", recipe)
        self.reload()

    def reload(self) -> None:
        """Read which entries there are, those of other processes included. A torn file is left aside."""
        self._open: dict[int, Any] = {}
        self._files = sorted(self.folder.glob("tokens-*.safetensors"))
        digests, places = [np.empty(0, "S16")], [np.empty((0, 3), np.int64)]
        for number, file in enumerate(self._files):
            try:
                with safe_open(file, "numpy") as content:
                    lengths = content.get_tensor("lengths")
                    digests.append(content.get_tensor("digests").view("S16")[:, 0])
            except SafetensorError:
                logger.warning("%s is cut short: its images are encoded anew", file)
                continue
            ends = lengths.cumsum()
            places.append(np.stack([np.full_like(ends, number), ends - lengths, ends], axis=1))
        # Sorted arrays, as a dictionary of 558K images would take 100 MB in each loader process.
        self._digests, self._places = np.concatenate(digests), np.concatenate(places)
        order = np.argsort(self._digests, kind="stable")
        self._digests, self._places = self._digests[order], self._places[order]

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, digest: bytes) -> bool:
        spot = np.searchsorted(self._digests, np.bytes_(digest))
        return bool(digest and spot < len(self) and self._digests[spot] == np.bytes_(digest))

    def __getitem__(self, digest: bytes) -> Tensor:
        if digest not in self:
            raise KeyError(digest)
        number, first, end = self._places[np.searchsorted(self._digests, np.bytes_(digest))].tolist()
        if number not in self._open:
            self._open[number] = safe_open(self._files[number], "pt").get_slice("tokens")  # memory-mapped
        return self._open[number][first:end].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a data loader's worker maps for itself

    def fill(
        self,
        files: Sequence[Path],
        llava: LlavaLlamaForCausalLM,
        *,
        batch_size: int = 16,
        workers: int = 0,
        on_error: Callable[[str], None],
        show: bool = True,
    ) -> int:
        """Encode the images that have no entry yet; equal files once.

        Args:
            on_error: called with what is wrong with an image that cannot be read; it then has no entry.
            workers: processes that read and prepare images.
            show: progress bars on stderr.

        Returns:
            How many images were encoded.
        """
        files = list(dict.fromkeys(files))
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(digest_of, files, chunksize=64)
            digests = list(tqdm(found, "reading images", len(files), unit="file", disable=not show))
        for file, digest in zip(files, digests, strict=True):
            if not digest:
                on_error(f"{file} cannot be read")
        missing = {d: file for d, file in zip(digests, files, strict=True) if d and d not in self}
        items: Any = list(missing.items())
        processor = llava.get_vision_tower().image_processor
        read = partial(_read_images, processor=processor, config=llava.config)  # in the loader's processes
        loader = DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=read)
        done: list[tuple[bytes, Tensor]] = []  # not on disk yet
        count = 0
        try:
            for batch in tqdm(loader, "visual cache", disable=not show):
                for problem in (found for _, found in batch if isinstance(found, str)):
                    on_error(problem)
                good = [(digest, pixels) for digest, pixels in batch if isinstance(pixels, Tensor)]
                if good:
                    tokens = llava.encode_images(torch.stack([pixels for _, pixels in good]))
                    done += zip((digest for digest, _ in good), tokens, strict=True)
                    count += len(good)
                if sum(len(one) for _, one in done) >= ROWS_PER_FILE:
                    self._write(done)
                    done = []
        finally:
            self._write(done)  # also after Ctrl-C
        self.reload()
        return count

    def _write(self, entries: list[tuple[bytes, Tensor]]) -> None:
        if not entries:
            return
        digests = np.frombuffer(b"".join(digest for digest, _ in entries), np.uint8).reshape(-1, 16).copy()
        content = {
            "digests": torch.from_numpy(digests),
            "lengths": torch.tensor([len(tokens) for _, tokens in entries]),
            "tokens": torch.cat([tokens for _, tokens in entries]).to("cpu", torch.float16),
        }
        with replacing_file(self.folder / f"tokens-{uuid.uuid4().hex}.safetensors") as partial:
            save_file(content, partial)


def _read_images(
    items: Sequence[tuple[bytes, Path]], processor: Any, config: Any
) -> list[tuple[bytes, Tensor | str]]:
    """(digest, pixels or what is wrong with the file) of image files."""
    found: list[tuple[bytes, Tensor | str]] = []
    for digest, file in items:
        try:
            found.append((digest, process_images([load_image(file)], processor, config)[0]))
        except UserError as error:
            found.append((digest, str(error)))
    return found


# In a run


def cached_tokens(
    prepared: Prepared,
    dataset: LazySupervisedDataset,
    data: DataArguments,
    training: TrainingArguments,
    say: Callable[[str], None],
) -> Callable[[str, Reducer | None], Tensor]:
    """Encode every image of the data that is not in the cache yet, with every reducer that a sample may draw;
    each process takes its share.

    Returns:
        The dataset's `load_visual`: the name of an image and the reducer that its sample drew (None: there is
        only one) -> its visual tokens [K, C], float32.
    """
    llava = prepared.llava
    folder = Path(data.image_folder or "")
    names = sorted({name for images in image_names(dataset.table) for name in images})

    def on_error(problem: str) -> None:
        if data.on_bad_sample == "error":
            raise UserError(problem)
        logger.warning("left out: %s", problem)

    with gathered(list(llava.get_vision_tower().parameters())):
        llava.get_vision_tower().to(training.device)
        caches: dict[Reducer, VisualCache] = {}
        for reducer in prepared.reducers:
            llava.set_reducer(reducer.spec)
            caches[reducer] = cache = VisualCache(data.visual_cache, recipe_of(llava))
            encoded = cache.fill(
                [folder / name for name in names[training.process_index :: training.world_size]],
                llava,
                workers=training.dataloader_num_workers,
                on_error=on_error,
                show=training.process_index == 0,
            )
            say(f"visual cache {cache.folder}: {encoded:,} images encoded for {reducer.spec}")
        llava.set_reducer(prepared.reducers[0].spec)
    if training.world_size > 1:
        torch.distributed.barrier()
        for cache in caches.values():
            cache.reload()
    return partial(load_cached, caches, folder)


def load_cached(
    caches: dict[Reducer, VisualCache], folder: Path, name: str, reducer: Reducer | None = None
) -> Tensor:
    """The visual tokens [K, C] of an image, by its file's content: they are never stale."""
    file = folder / name
    cache = caches[reducer] if reducer else next(iter(caches.values()))
    try:
        return cache[digest_of(file)].float()  # a CPU's autocast does not know float16
    except KeyError:
        load_image(file)  # says what is wrong with it
        raise UserError(f"{file} has changed since the visual cache was filled: start again") from None
