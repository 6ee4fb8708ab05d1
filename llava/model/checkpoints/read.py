"""Reading weights: every format under one set of names, every weight checked.

Reading never runs code from a file (pickles are opened with weights_only) and never copies a file into
memory: tensors are views of the mapped file until the model takes them.
"""

import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.errors import UserError, first_line
from llava.model.checkpoints.inspect import CheckpointInfo, describes_llava, read_json, shards_of
from llava.model.checkpoints.llava_hf import hf_vocabulary, with_rows
from llava.model.checkpoints.names import EMBEDDINGS, PROJECTOR, canonical_name

logger = logging.getLogger(__name__)

MAX_ADDED_TOKENS = 16
"""So many more rows than its base a checkpoint may have: tokens added in training ([PAD], <im_start> ...)."""


@dataclass
class Weights:
    """Tensors by canonical name, and the file each came from."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    source: dict[str, Path] = field(default_factory=dict)

    def update(self, other: "Weights") -> None:
        self.tensors.update(other.tensors)
        self.source.update(other.source)

    def set(self, name: str, tensor: Tensor, source: Path) -> None:
        self.tensors[name] = tensor
        self.source[name] = source

    def select(self, keep: Callable[[str], bool]) -> "Weights":
        """Those whose name passes."""
        names = [name for name in self.tensors if keep(name)]
        return Weights({n: self.tensors[n] for n in names}, {n: self.source[n] for n in names})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one .safetensors or .bin file, under the names in it, mapped and not copied, on the CPU.

    Raises:
        UserError: not there, cut off, a Git LFS pointer, or a pickle with more than tensors in it.
    """
    again = "download or copy it again"
    if not file.is_file():
        raise UserError(f"{file} is missing: {again}")
    with file.open("rb") as stream:
        head = stream.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device="cpu") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        zipped = head.startswith(b"PK")  # the format before torch 1.6 cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds more than tensors and is not opened because that could run code: "
            f"{again}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{file} is damaged or cut off ({first_line(error)}): {again}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} is not a table of weights: {again}")
    return content


def read_weights(weights: Path, keep: Callable[[str], bool] = lambda name: True) -> Weights:
    """A model's weights under canonical names.

    Args:
        weights: a weight file or the index of a sharded one.
        keep: which canonical names are wanted; shards that the index lists without any are not opened.

    Raises:
        UserError: a file is missing or damaged.
    """
    shards = shards_of(weights)
    if weights.suffix == ".json":
        weight_map = read_json(weights)["weight_map"]
        wanted = {file for name, file in weight_map.items() if (new := canonical_name(name)) and keep(new)}
        shards = [shard for shard in shards if shard.name in wanted]
    found = Weights()
    for shard in shards:
        for name, tensor in read_tensors(shard).items():
            new = canonical_name(name)
            if new is not None and keep(new):
                found.set(new, tensor, shard)
    return found


def read_projector(file: str | Path) -> Weights:
    """What a mm_projector.bin or a non_lora_trainables.bin holds: the projector, perhaps embeddings.

    Raises:
        UserError: unreadable, or there is no projector in it.
    """
    found = read_weights(Path(file))
    if not any(name.startswith(PROJECTOR) for name in found.tensors):
        raise UserError(
            f"{file} holds no mm_projector weights ({_few(sorted(found.tensors))}): pass a mm_projector.bin"
        )
    return found


def read_adapter(info: CheckpointInfo) -> dict[str, Tensor]:
    """The LoRA weights under PEFT's own names (`base_model.model.model.layers.0...lora_A.weight`)."""
    assert info.adapter is not None
    return read_tensors(info.adapter)


def read_model_weights(info: CheckpointInfo) -> Weights:
    """Everything a checkpoint and its base hold, LoRA aside: the base's weights, the checkpoint's over them.

    llava-hf's rows for `<image>`, padding and filling are cut off. Tower weights are included where a file
    has them; whether to use them is the loader's decision.

    Raises:
        UserError: a base is needed and unknown, a file is missing or damaged.
    """
    if info.needs_base:
        found = read_model_weights(info.require_base())
        if info.extra is not None:
            found.update(read_weights(info.extra))
        elif info.kind == "lora" and describes_llava(info.config) and not info.require_base().is_llava:
            raise UserError(
                f"{info.path} has LoRA weights but no non_lora_trainables.bin, so no projector (LLaVA's "
                "intermediate checkpoints are like that): pass the final directory of the run"
            )
        return found
    assert info.weights is not None
    found = read_weights(info.weights)
    if info.kind == "llava_hf":
        rows = hf_vocabulary(info.config)
        for name in EMBEDDINGS:
            if name in found.tensors:
                found.set(name, found.tensors[name][:rows], found.source[name])
    return found


def fit_vocabulary(found: Weights, rows: int) -> Weights:
    """Embeddings and head with `rows` rows; up to MAX_ADDED_TOKENS new ones are the mean of the old.

    Weights that have enough rows stay as they are: a vocabulary padded beyond the tokenizer is common.
    """
    grown = Weights(dict(found.tensors), dict(found.source))
    for name in EMBEDDINGS:
        table = found.tensors.get(name)
        if table is None or not 0 < rows - table.shape[0] <= MAX_ADDED_TOKENS:
            continue
        logger.info("%d rows of %s are new (mean of the others)", rows - table.shape[0], name)
        grown.set(name, with_rows(table, rows), found.source[name])
    return grown


def check_weights(found: Weights, expected: Mapping[str, torch.Size], info: CheckpointInfo) -> None:
    """Every expected weight is there in its shape, and nothing else.

    Raises:
        UserError: names a few weights, the file, and the likely cause.
    """
    asks = f"{info.llava_config.path / 'config.json'} asks for"
    for name, tensor in found.tensors.items():
        if name in expected and tensor.shape != expected[name]:
            source = found.source[name]
            cause = "the file and config.json do not belong together"
            if info.base is not None and source.is_relative_to(info.base.path):
                cause = f"{info.base.path} is probably the wrong base"
                if info.declared_base:
                    cause += f" ({info.path.name} was trained on {info.declared_base})"
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}, but {asks} {list(expected[name])}; {cause}"
            )
    if missing := sorted(expected.keys() - found.tensors.keys()):
        raise UserError(
            f"{info.path}{f' on {info.base.path}' if info.base else ''} lacks {len(missing)} weights that "
            f"{asks} ({_few(missing)}): a file is incomplete, or config.json belongs to another model"
        )
    if unexpected := sorted(found.tensors.keys() - expected.keys()):
        raise UserError(
            f"{found.source[unexpected[0]]} holds {len(unexpected)} weights that this model does not have "
            f"({_few(unexpected)}): config.json belongs to another model, or the format is not known"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
