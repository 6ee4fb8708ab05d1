"""Visual tokens kept on disk: tower and reducer are frozen, so each image needs them only once.

A cache folder has one subfolder per way of making tokens (`Recipe`: the tower's weights, the reducer, how
pictures become pixels, the dtype), and in it entries by the content of the image file. So nothing in it can
be stale: a changed image, tower, reducer or preprocessing is another key. Against changes of the program
itself a few synthetic pictures are encoded at each start and compared with what the cache was begun with.

On disk, per writing process: `<name>.tokens`, float16 rows [C] one after the other, and `<name>.index`, one
line `digest first_row rows` per image, written after the rows. A killed process leaves at most rows without
a line. Several processes may fill one folder at a time; reading takes all files together, memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.errors import UserError
from llava.mm_utils import load_image, process_images
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

Encode = Callable[[Tensor], list[Tensor]]
"""Pixels [B, 3, H, W] -> B tensors [K_i, C], such as `LlavaLlamaForCausalLM.encode_images`."""

DIGEST = "S32"  # 32 hexadecimal digits: 128 bits of SHA-256


@dataclass(frozen=True)
class Recipe:
    """All that decides what tokens an image becomes.

    Attributes:
        tower: SHA-256 over names and values of the tower's weights.
        select_layer, select_feature: see `llava.model.vision_tower`.
        reducer: its spec.
        preprocessing: the image processor's settings and the aspect ratio mode.
        dtype: the tower computes in.
        width: C, values per token.
    """

    tower: str
    select_layer: int
    select_feature: str
    reducer: str
    preprocessing: str
    dtype: str
    width: int

    @property
    def key(self) -> str:
        """Name of the recipe's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def recipe_of(llava: LlavaLlamaForCausalLM) -> Recipe:
    """The recipe of a model as it is set up now."""
    tower = llava.get_vision_tower()
    settings = {
        "processor": tower.image_processor.to_dict(),
        "aspect": llava.config.image_aspect_ratio,
        "pinpoints": llava.config.image_grid_pinpoints,
    }
    return Recipe(
        tower=fingerprint(tower),
        select_layer=tower.select_layer,
        select_feature=tower.select_feature,
        reducer=llava.reducer.spec,
        preprocessing=json.dumps(settings, sort_keys=True, default=str),
        dtype=str(tower.dtype),
        width=tower.hidden_size,
    )


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(file: Path) -> bytes:
    """The key of an image file: its content's, whatever it is called. b"" if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:32].encode()
    except OSError:
        return b""


class VisualCache:
    """The entries of one recipe, read-only; `fill` adds the ones that are missing.

    Indexable by entry number, which `find` gives: `cache[i]` is a float16 tensor [K_i, C].
    """

    def __init__(self, folder: str | Path, recipe: Recipe):
        self.folder = Path(folder) / recipe.key
        self.recipe = recipe
        self._maps: dict[int, np.ndarray] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_recipe()
        self.reload()

    def _write_recipe(self) -> None:
        beside = self.folder / f".recipe.{os.getpid()}"
        beside.write_text(json.dumps(asdict(self.recipe), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.folder / "recipe.json")

    def reload(self) -> None:
        """Read the indices of all files, those of other processes included."""
        self._maps.clear()
        self._shards = sorted(self.folder.glob("*.tokens"))
        row_bytes = 2 * self.recipe.width
        digests: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self._shards):
            rows = shard.stat().st_size // row_bytes
            index = shard.with_suffix(".index")
            for line in index.read_bytes().splitlines(keepends=True) if index.exists() else []:
                fields = line.split()
                if not line.endswith(b"\n") or len(fields) != 3:
                    continue  # cut short by a kill
                first, count = int(fields[1]), int(fields[2])
                if first + count <= rows:
                    digests.append(fields[0])
                    places.append((number, first, count))
        keys = np.array(digests, dtype=DIGEST)
        order = np.argsort(keys, kind="stable")
        self._digests = keys[order]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)[order]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: Sequence[bytes]) -> np.ndarray:
        """Entry numbers of image digests, int64; -1 where there is none."""
        wanted = np.array(digests, dtype=DIGEST)
        if not len(self):
            return np.full(len(wanted), -1)
        spots = np.searchsorted(self._digests, wanted).clip(max=len(self) - 1)
        return np.where(self._digests[spots] == wanted, spots, -1)

    def __getitem__(self, entry: int) -> Tensor:
        shard, first, count = self._places[entry]
        if shard not in self._maps:
            # Opened where it is used first: a data loader's worker maps for itself.
            file, width = self._shards[shard], self.recipe.width
            rows = file.stat().st_size // (
                2 * width
            )  # of a killed writer's last row there may be only a part
            self._maps[shard] = np.memmap(file, dtype=np.float16, mode="r", shape=(rows, width))
        return torch.from_numpy(np.array(self._maps[shard][first : first + count]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    # Filling

    def check_program(self, process: Callable[[Image.Image], Tensor], encode: Encode) -> bool:
        """Whether the program still makes of a few synthetic pictures what it made when the cache was begun.

        If not, the entries are deleted: tower or reducer have changed in a way their settings do not show.
        """
        probe = self.folder / "probe.npz"
        now = [
            tokens.float().cpu().numpy() for tokens in encode(torch.stack([process(p) for p in _pictures()]))
        ]
        if probe.exists():
            with np.load(probe) as stored:
                before = [stored[name] for name in sorted(stored.files)]
            if len(before) == len(now) and all(
                a.shape == b.shape and np.allclose(a, b, rtol=0.02, atol=0.02 * np.abs(a).max())
                for a, b in zip(before, now, strict=True)
            ):
                return True
            shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self._write_recipe()
            self.reload()
        beside = self.folder / f".probe.{os.getpid()}.npz"
        np.savez(beside, **{f"{number:03}": tokens for number, tokens in enumerate(now)})
        os.replace(beside, probe)
        return False

    def fill(
        self,
        files: Sequence[Path],
        digests: Sequence[bytes],
        process: Callable[[Image.Image], Tensor],
        encode: Encode,
        *,
        batch_size: int = 16,
        workers: int = 0,
        on_error: Callable[[Path, str], None],
        show: bool = True,
    ) -> int:
        """Encode the images that have no entry yet.

        Args:
            files, digests: the images and their `digest_of`; equal digests are encoded once.
            process: PIL image -> pixels [3, H, W].
            on_error: called with a file that is no readable image, and why; it then has no entry.
            workers: processes that read and prepare images.

        Returns:
            How many images were encoded.
        """
        missing: dict[bytes, Path] = {}
        for file, digest, entry in zip(files, digests, self.find(digests), strict=True):
            if entry < 0 and digest:
                missing.setdefault(digest, file)
        if not missing:
            return 0
        pixels = DataLoader(
            _Pixels(list(missing.items()), process),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=list,
        )
        name = self.folder / uuid.uuid4().hex
        done = 0
        with (
            tqdm(total=len(missing), unit="image", desc="visual cache", disable=not show) as bar,
            name.with_suffix(".tokens").open("wb") as tokens_file,
            name.with_suffix(".index").open("wb") as index_file,
        ):
            row = 0
            for batch in pixels:
                for _, file, problem in batch:
                    if isinstance(problem, str):
                        on_error(file, problem)
                good = [(digest, value) for digest, _, value in batch if isinstance(value, Tensor)]
                lines = []
                for (digest, _), tokens in zip(
                    good, _encode_batch(encode, [value for _, value in good]), strict=True
                ):
                    tokens_file.write(tokens.to("cpu", torch.float16).contiguous().numpy().tobytes())
                    lines.append(b"%s %d %d\n" % (digest, row, len(tokens)))
                    row += len(tokens)
                tokens_file.flush()
                index_file.write(b"".join(lines))
                index_file.flush()
                done += len(good)
                bar.update(len(batch))
        self.reload()
        return done


def _encode_batch(encode: Encode, pixels: list[Tensor]) -> list[Tensor]:
    return encode(torch.stack(pixels)) if pixels else []


class _Pixels(Dataset):
    """(digest, file, pixels or what is wrong with the file)."""

    def __init__(self, items: list[tuple[bytes, Path]], process: Callable[[Image.Image], Tensor]):
        self.items = items
        self.process = process

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[bytes, Path, Tensor | str]:
        digest, file = self.items[row]
        try:
            return digest, file, self.process(load_image(file))
        except UserError as error:
            return digest, file, str(error)


def _pictures() -> Iterator[Image.Image]:
    """Synthetic pictures of several shapes: gradients, edges and noise from a fixed seed."""
    random = np.random.default_rng(0)
    for height, width in ((96, 96), (80, 144), (160, 60)):
        y, x = np.mgrid[0:height, 0:width]
        picture = np.stack([255 * y / height, 255 * x / width, 255 * ((x // 16 + y // 16) % 2)], axis=-1)
        picture += random.normal(0, 12, picture.shape)
        yield Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def hash_files(files: Sequence[Path], *, show: bool = True) -> list[bytes]:
    """`digest_of` each file, several at a time; a file named often is read once."""
    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = tqdm(
            pool.map(digest_of, unique, chunksize=64),
            total=len(unique),
            unit="file",
            desc="reading images",
            disable=not show,
        )
        known = dict(zip(unique, found, strict=True))
    return [known[file] for file in files]


def pixels_of(image: Image.Image, processor: Any, config: Any) -> Tensor:
    """[3, H, W] (or [tiles, 3, H, W]): what the dataset would make of the image."""
    return process_images([image], processor, config)[0]


def processing(llava: LlavaLlamaForCausalLM) -> Callable[[Image.Image], Tensor]:
    """How this model's pictures become pixels."""
    return partial(pixels_of, processor=llava.get_vision_tower().image_processor, config=llava.config)
