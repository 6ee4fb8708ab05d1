"""The only reader and writer of on-disk formats.

A checkpoint is recognised by what is in its directory, never by how the directory is called. Whatever the
format, its weights are handed out under one set of names (`canonical_name`), those of released LLaVA:

    model.embed_tokens.*  model.layers.*  model.norm.*  lm_head.*      the language model
    model.mm_projector.*  model.image_newline                          the projector
    model.vision_tower.*                                               the tower, named as in transformers 5

Reading never runs code from a file (pickles are opened with weights_only) and never copies a file into
memory: tensors are views of the mapped file until the model takes them. Writing goes beside the target and
is renamed, so a directory is either the old checkpoint or the new one.
"""

import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from llava.errors import UserError, first_line
from llava.model.tokenization import save_tokenizer

logger = logging.getLogger(__name__)

KINDS = {
    "full": "a LLaVA model: language model and projector",
    "lora": "LoRA adapters (and a projector) for a language model",
    "projector": "a projector for a language model",
    "llava_hf": "a LLaVA model in transformers' own format",
    "plain_lm": "a language model without vision",
    "vision_tower": "a vision tower",
}

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where a model's weights are looked for, first found first read."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
EXTRA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")

TOWER_TYPES = (
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
    "dinov2",
    "dinov2_with_registers",
)

HUB_ERRORS = (OSError, OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError)

TOWER = "model.vision_tower."
PROJECTOR = "model.mm_projector."
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")

MAX_ADDED_TOKENS = 16
"""So many more rows than its base a checkpoint may have: tokens added in training ([PAD], <im_start> ...)."""


# Finding -----------------------------------------------------------------------------------------


def resolve_beside(name: str, beside: Path | None = None) -> Path | None:
    """The local directory `name` means: as given, else relative to `beside` and each of its parents."""
    candidates = [Path(name).expanduser()]
    if beside is not None and not candidates[0].is_absolute():
        here = beside.resolve()
        candidates += [folder / name for folder in (here, *here.parents)]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def resolve_directory(
    name: str | Path, *, beside: Path | None = None, remedy: str = "--model-path PATH"
) -> Path:
    """A local directory of that name, else the Hub's repository downloaded.

    Args:
        name: a directory, or `owner/name` on the Hub. A local directory always wins.
        beside: where relative names inside a checkpoint are looked for too.
        remedy: the flag to name where it cannot be found.

    Raises:
        UserError: neither here nor on the Hub, or the Hub cannot be reached.
    """
    text = str(name)
    if not text.strip():
        raise UserError(f"an empty name is no checkpoint: pass {remedy}")
    if (local := resolve_beside(text, beside)) is not None:
        return local
    if Path(text).expanduser().is_file():
        raise UserError(f"{text} is a file: pass the directory it lies in ({remedy})")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise UserError(f"there is no directory {text}: pass {remedy}, or a Hub name such as owner/name")
    try:
        # A repository that holds both formats would be downloaded twice over.
        names = HfApi().list_repo_files(text)
        whole = any(re.fullmatch(r"model.*\.safetensors", file) for file in names)
        skip = ["pytorch_model*.bin"] if whole else []
    except HUB_ERRORS:
        skip = []  # no network: whatever an earlier download left in the cache
    try:
        return Path(
            snapshot_download(
                text,
                allow_patterns=["*.json", "*.model", "*.txt", "*.safetensors", "*.bin", "*.jinja"],
                ignore_patterns=[*skip, "*/*", "training_args.bin", "optimizer.bin"],
            )
        )
    except HUB_ERRORS as error:
        offline = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)
        why = "no network, and not in its cache" if offline else first_line(error)
        raise UserError(
            f"{text} is no directory here and cannot be had from the Hub ({why}): download it where there is "
            f"a network (`hf download {text} --local-dir DIR`) and pass {remedy}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: not there, not UTF-8, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy it from where the checkpoint came from") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): download it again") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}): download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object: download it again")
    return content


def _first_file(directory: Path, names: Iterable[str]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


# Recognising -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointInfo:
    """What a directory holds.

    Attributes:
        path: the directory.
        kind: a key of `KINDS`.
        config: config.json as written (a llava-hf config too: `llava_config_dict` translates); {} if none.
        weights: the file, or the index, of the model's own weights; None for adapters and projectors.
        adapter: the file of LoRA weights.
        adapter_config: adapter_config.json.
        extra: non_lora_trainables or mm_projector, what belongs beside the base's weights.
        declared_base: the base the checkpoint names itself, "" if none.
        base: what the base is, where one is needed and known.
        has_tokenizer: whether tokenizer files lie here.
    """

    path: Path
    kind: str
    config: dict[str, Any] = field(repr=False)
    weights: Path | None = None
    adapter: Path | None = None
    adapter_config: dict[str, Any] | None = field(default=None, repr=False)
    extra: Path | None = None
    declared_base: str = ""
    base: "CheckpointInfo | None" = None
    has_tokenizer: bool = False

    @property
    def needs_base(self) -> bool:
        return self.kind in ("lora", "projector")

    @property
    def is_llava(self) -> bool:
        """Whether the model it loads into can see."""
        if self.kind == "lora":
            return _describes_llava(self.config) or (self.base is not None and self.base.is_llava)
        return self.kind in ("full", "projector", "llava_hf")

    @property
    def llava_config(self) -> "CheckpointInfo":
        """Whose config describes the model: this checkpoint, or the base of adapters without a config."""
        if self.base is not None and not _describes_llava(self.config) and self.base.is_llava:
            return self.base
        return self

    @property
    def files(self) -> list[Path]:
        """The files that hold weights, the base's not included."""
        own = [file for file in (self.adapter, self.extra) if file is not None]
        return [*(_shards(self.weights) if self.weights is not None else []), *own]

    def require_base(self) -> "CheckpointInfo":
        """The base.

        Raises:
            UserError: none was given, and none is recorded that lies on this machine.
        """
        if self.base is not None:
            return self.base
        what = {"lora": "LoRA adapters", "projector": "only a projector"}[self.kind]
        says = "adapter_config.json" if self.kind == "lora" else "config.json"
        of = f" of {self.declared_base} ({says} says so)" if self.declared_base else ""
        raise UserError(
            f"{self.path} holds {what}{of}, not a whole model: pass its base with "
            f"--model-base {self.declared_base or 'PATH'} (model_base=)"
        )


def _describes_llava(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures") or []
    return bool(
        config.get("mm_vision_tower")
        or config.get("model_type") == "llava_llama"
        or any(name in ("LlavaLlamaForCausalLM", "LlavaForConditionalGeneration") for name in architectures)
    )


def _is_llava_hf(config: Mapping[str, Any]) -> bool:
    return "vision_config" in config and "text_config" in config and config.get("model_type") == "llava"


def inspect_checkpoint(path: str | Path, base: str | Path | None = None) -> CheckpointInfo:
    """Say what a checkpoint is from its files.

    Args:
        path: a directory, or `owner/name` on the Hub.
        base: the base of adapters or of a projector. Without it the base the checkpoint records is used if
            that is a directory on this machine (and this is logged); one on the Hub must be asked for.

    Raises:
        UserError: no such directory, or nothing in it that can be loaded.
    """
    directory = resolve_directory(path)
    info = _inspect_one(directory)
    if not info.needs_base:
        if base:
            logger.warning("%s is %s: --model-base %s is not used", directory, KINDS[info.kind], base)
        return info
    base_directory = None
    if base:
        base_directory = resolve_directory(base, remedy="--model-base PATH")
    elif info.declared_base and (base_directory := resolve_beside(info.declared_base, directory)) is not None:
        logger.warning("%s names its base: using %s", directory, base_directory)
    if base_directory is None:
        return info
    base_info = _inspect_one(base_directory)
    if base_info.kind not in ("full", "llava_hf", "plain_lm"):
        hint = ": merge it first with `llava tools merge-lora`" if base_info.kind == "lora" else ""
        raise UserError(
            f"--model-base {base_directory} is {KINDS[base_info.kind]}, not a language model that "
            f"{directory} could be applied to{hint}"
        )
    return replace(info, base=base_info)


def _inspect_one(directory: Path) -> CheckpointInfo:
    config_file = directory / "config.json"
    config = read_json(config_file) if config_file.exists() else {}
    weights = _first_file(directory, WEIGHT_FILES)
    has_tokenizer = _first_file(directory, TOKENIZER_FILES) is not None
    shards = sorted(file.name for file in directory.glob("*-of-*") if file.suffix in (".safetensors", ".bin"))
    if weights is None and shards:
        index = WEIGHT_FILES[1] if shards[0].endswith(".safetensors") else WEIGHT_FILES[3]
        raise UserError(
            f"{directory} has {len(shards)} shards ({shards[0]}, ...) but no {index}: download it"
        )

    adapter = _first_file(directory, ADAPTER_FILES)
    adapter_config_file = directory / "adapter_config.json"
    if weights is None and (adapter is not None or adapter_config_file.exists()):
        adapter_config = read_json(adapter_config_file)
        if adapter is None:
            raise UserError(
                f"{directory} has adapter_config.json but no {ADAPTER_FILES[0]} or .bin: download it again"
            )
        return CheckpointInfo(
            directory,
            "lora",
            config,
            adapter=adapter,
            adapter_config=adapter_config,
            extra=_first_file(directory, EXTRA_FILES),
            declared_base=adapter_config.get("base_model_name_or_path") or "",
            has_tokenizer=has_tokenizer,
        )

    if not config:
        inside = sorted(file.name for file in directory.iterdir())[:5] if directory.is_dir() else []
        what = f"it holds {', '.join(inside)}" if inside else "it is empty"
        raise UserError(f"{directory} has no config.json ({what}): pass the directory of a checkpoint")
    if config.get("model_type") in TOWER_TYPES:
        return CheckpointInfo(directory, "vision_tower", config, weights)
    architectures = config.get("architectures") or []
    if _is_llava_hf(config):
        if weights is None:
            raise UserError(f"{directory} has no weights ({', '.join(WEIGHT_FILES)}): download it again")
        return CheckpointInfo(directory, "llava_hf", config, weights, has_tokenizer=has_tokenizer)
    if _describes_llava(config):
        projector = _first_file(directory, PROJECTOR_FILES)
        if other := [name for name in architectures if re.match(r"Llava(Mpt|Mistral|Qwen|Gemma)", name)]:
            raise UserError(f"{directory} is a {other[0]}: only LLaVA on a LLaMA language model is supported")
        if weights is not None:
            return CheckpointInfo(directory, "full", config, weights, has_tokenizer=has_tokenizer)
        if projector is not None:
            return CheckpointInfo(
                directory,
                "projector",
                config,
                extra=projector,
                declared_base=config.get("_name_or_path") or "",
                has_tokenizer=has_tokenizer,
            )
        raise UserError(
            f"{directory} has a LLaVA config.json but no weights: neither {', '.join(WEIGHT_FILES)} "
            f"(a model) nor {PROJECTOR_FILES[1]} (a projector) nor {ADAPTER_FILES[0]} (LoRA)"
        )
    causal = "vocab_size" in config or any(name.endswith("ForCausalLM") for name in architectures)
    if weights is not None and causal:
        return CheckpointInfo(directory, "plain_lm", config, weights, has_tokenizer=has_tokenizer)
    described = architectures[0] if architectures else config.get("model_type", "unknown model")
    raise UserError(f"{directory} holds a {described}: no LLaVA, no language model and no vision tower")


# Names -------------------------------------------------------------------------------------------

_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^module\.", ""),  # DDP
        (r"^base_model\.model\.", ""),  # PEFT's wrapper
        (r"^(?:model\.)+(?=model\.)", ""),
        # llava-hf: on disk (4.37 and today), then in transformers 5's memory
        (r"^(?:model\.)?language_model\.(?:model\.)?lm_head\.", "lm_head."),
        (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
        (r"^(?:model\.)?multi_modal_projector\.linear_1\.", PROJECTOR + "0."),
        (r"^(?:model\.)?multi_modal_projector\.linear_2\.", PROJECTOR + "2."),
        (r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", TOWER),
        (r"^model\.lm_head\.", "lm_head."),
        (
            r"^(?=(?:mm_projector|embed_tokens|layers|norm)\.|image_newline$)",
            "model.",
        ),  # saved without the head
    )
)

_BUFFERS = re.compile(r"(?:rotary_emb\.inv_freq|position_ids)$")


def canonical_name(name: str) -> str | None:
    """The one name of a weight, whatever wrote it; None for tables that old versions saved and none needs.

    Knows released LLaVA, PEFT's prefixes, llava-hf as written by transformers 4.37 to 5 and as 5 names it in
    memory, with and without a leading `model.`.
    """
    if _BUFFERS.search(name):
        return None
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def llava_hf_name(name: str) -> str:
    """What llava-hf files call a weight with this canonical name; the inverse of `canonical_name`."""
    if name.startswith(PROJECTOR):
        layer, _, rest = name.removeprefix(PROJECTOR).partition(".")
        return f"multi_modal_projector.linear_{int(layer) // 2 + 1}.{rest}"
    if name.startswith(TOWER):
        return f"vision_tower.vision_model.{name.removeprefix(TOWER)}"
    return f"language_model.{name}"


# Reading -----------------------------------------------------------------------------------------


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
        if head and not head.startswith((b"PK", b"\x80")):  # a zip, or the pickle it was before torch 1.6
            raise UserError(f"{file} is not a PyTorch weight file: {again}")
        zipped = head.startswith(b"PK")  # the older format cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({first_line(error)}): {again}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors, and is not opened because that could run code"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged or cut off ({first_line(error)}): {again}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} is not a table of weights: {again}")
    return content


def _shards(weights: Path) -> list[Path]:
    """The files of a model: itself, or those its index names."""
    if weights.suffix != ".json":
        return [weights]
    weight_map = read_json(weights).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{weights} has no weight_map: download it again")
    return [weights.parent / name for name in sorted(set(weight_map.values()))]


def read_weights(weights: Path, keep: Callable[[str], bool] = lambda name: True) -> Weights:
    """A model's weights under canonical names.

    Args:
        weights: a weight file or the index of a sharded one.
        keep: which canonical names are wanted; shards without any are not opened.

    Raises:
        UserError: a file is missing or damaged, or index and shards disagree.
    """
    indexed: dict[str, str] | None = None
    shards = _shards(weights)
    if weights.suffix == ".json":
        indexed = read_json(weights)["weight_map"]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(
                f"{weights} lists {len(shards)} shards, of which {', '.join(missing[:3])} "
                f"{'is' if len(missing) == 1 else 'are'} missing: download or copy again"
            )
        wanted = {file for name, file in indexed.items() if (new := canonical_name(name)) and keep(new)}
        shards = [shard for shard in shards if shard.name in wanted]
    found = Weights()
    for shard in shards:
        tensors = read_tensors(shard)
        if indexed is not None:
            listed = {name for name, file in indexed.items() if file == shard.name}
            for names, problem in (
                (listed - tensors.keys(), f"lists weights that {shard.name} does not hold"),
                (tensors.keys() - listed, f"does not list all that {shard.name} holds"),
            ):
                if names := sorted(name for name in names if canonical_name(name)):
                    raise UserError(f"{weights} {problem} ({_few(names)}): download both again")
        for name, tensor in tensors.items():
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
    if info.adapter is None:
        raise ValueError(f"{info.path} has no adapter")
    return read_tensors(info.adapter)


def read_model_weights(info: CheckpointInfo) -> Weights:
    """Everything a checkpoint and its base hold, LoRA aside: the base's weights, the checkpoint's over them.

    llava-hf's rows for `<image>`, padding and filling are cut off. Tower weights are included where a file
    has them; whether to use them is the builder's business.

    Raises:
        UserError: a base is needed and unknown, a file is missing or damaged.
    """
    if info.needs_base:
        found = read_model_weights(info.require_base())
        if info.extra is not None:
            found.update(read_weights(info.extra))
        elif info.kind == "lora" and _describes_llava(info.config) and not info.base.is_llava:
            raise UserError(
                f"{info.path} has LoRA weights but no {EXTRA_FILES[1]}, so no projector (LLaVA's "
                "intermediate checkpoints are like that): pass the final directory of the run"
            )
        return found
    if info.weights is None:
        raise ValueError(f"{info.path} has no weights of its own")
    found = read_weights(info.weights)
    if info.kind == "llava_hf":
        rows = hf_vocabulary(info.config)
        for name in EMBEDDINGS:
            if name in found.tensors:
                found.set(name, found.tensors[name][:rows], found.source[name])
    return found


def fit_vocabulary(found: Weights, rows: int) -> Weights:
    """Embeddings and head with `rows` rows; up to MAX_ADDED_TOKENS new ones are the mean of the old.

    That is how LLaVA starts the rows of the tokens it adds. Weights that have enough rows are returned as
    they are: a vocabulary padded beyond the tokenizer is common.
    """
    grown = Weights(dict(found.tensors), dict(found.source))
    for name in EMBEDDINGS:
        table = found.tensors.get(name)
        if table is None or not 0 < rows - table.shape[0] <= MAX_ADDED_TOKENS:
            continue
        logger.info("%d rows of %s are new (mean of the others)", rows - table.shape[0], name)
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        grown.set(name, torch.cat([table, mean.expand(rows - table.shape[0], -1)]), found.source[name])
    return grown


def check_weights(found: Weights, expected: Mapping[str, torch.Size], info: CheckpointInfo) -> None:
    """Every expected weight is there in its shape, and nothing else.

    Raises:
        UserError: names a few weights, the file, and the likely cause.
    """
    where = info.path if info.base is None else f"{info.path} on {info.base.path}"
    for name, tensor in found.tensors.items():
        if name in expected and tensor.shape != expected[name]:
            source = found.source[name]
            if info.base is not None and source.is_relative_to(info.base.path):
                cause = f"{info.base.path} is probably the wrong base"
                if info.declared_base:
                    cause += f" ({info.path.name} was trained on {info.declared_base})"
            else:
                cause = "the file and config.json do not belong together"
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}, but "
                f"{info.llava_config.path / 'config.json'} asks for {list(expected[name])}; {cause}"
            )
    if missing := sorted(expected.keys() - found.tensors.keys()):
        files = info.files or (info.base.files if info.base is not None else [])
        projector = all(name.startswith(PROJECTOR) for name in missing)
        hint = (
            "it has no projector"
            if projector
            else "the file is incomplete, or config.json belongs to another model"
        )
        raise UserError(
            f"{where}: {len(missing)} weights are in none of {_few([file.name for file in files])} "
            f"({_few(missing)}): {hint}"
        )
    if unexpected := sorted(found.tensors.keys() - expected.keys()):
        raise UserError(
            f"{found.source[unexpected[0]]} holds {len(unexpected)} weights that this model does not have "
            f"({_few(unexpected)}): config.json belongs to another model, or the format is not known"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# llava-hf's config -------------------------------------------------------------------------------


def hf_vocabulary(config: Mapping[str, Any]) -> int:
    """Rows of llava-hf embeddings that are the language model's own: `<image>` is the first one added."""
    image = config.get("image_token_index", config.get("image_token_id"))
    return int(image if image is not None else 32000)


def llava_config_dict(info: CheckpointInfo) -> dict[str, Any]:
    """The config of the model a checkpoint loads into, in LLaVA's own terms.

    For llava-hf the fields are translated; its tower lies in the checkpoint itself, and the pictures are
    padded to squares, as LLaVA-1.5 was trained (llava-hf's config does not say so, unless we wrote it).

    Raises:
        UserError: a llava-hf model of another make than LLaVA-1.5 on LLaMA.
    """
    owner = info.llava_config
    if owner.kind != "llava_hf":
        return dict(owner.config)
    config = owner.config
    text, vision = dict(config["text_config"]), config["vision_config"]
    if text.get("model_type", "llama") != "llama":
        raise UserError(
            f"{owner.path}: its language model is {text['model_type']!r}; only LLaMA is supported"
        )
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{owner.path}: its projector uses {config['projector_hidden_act']!r}; only gelu is supported"
        )
    strategy = config.get("vision_feature_select_strategy", "default")
    text = LlamaConfig(**{key: value for key, value in text.items() if key != "model_type"}).to_dict()
    for dropped in ("architectures", "_name_or_path", "transformers_version"):
        text.pop(dropped, None)
    return {
        **text,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": hf_vocabulary(config),
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "image_aspect_ratio": config.get("image_aspect_ratio", "pad"),
        "mm_vision_tower": str(owner.path),
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if strategy == "full" else "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.get("hidden_size", 768),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **({"mm_token_reducer": config["mm_token_reducer"]} if "mm_token_reducer" in config else {}),
    }


# Writing -----------------------------------------------------------------------------------------


@contextmanager
def replacing(out: str | Path) -> Iterator[Path]:
    """A new directory beside `out` to write into; at the end its files become `out`'s.

    A new `out` appears by one rename. Into an existing one (a run's directory, with checkpoint-N inside) the
    files are moved, config.json last, after weights of the same kind under other names are gone: a directory
    without config.json is refused on reading, one with it is complete. On an error nothing of `out` changes.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield fresh
        # mkdtemp's is private, and so are safetensors' files; others may read what the user lets them.
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o777 & ~umask)
        for file in fresh.iterdir():
            file.chmod(0o666 & ~umask)
        if not out.exists():
            os.replace(fresh, out)
            return
        new = {file.name for file in fresh.iterdir()}
        if "config.json" in new:
            (out / "config.json").unlink(missing_ok=True)
        if any(_is_model_weight(name) for name in new):
            for file in out.iterdir():
                if _is_model_weight(file.name) and file.name not in new:
                    file.unlink()
        for name in sorted(new, key=lambda name: name == "config.json"):
            os.replace(fresh / name, out / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _is_model_weight(name: str) -> bool:
    return bool(re.fullmatch(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as transformers writes them."""
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def write_weights(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """model.safetensors, or shards of 5 GB with their index."""
    # A part of a larger tensor is copied: the file would get the whole.
    own = {
        name: tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
        for name, tensor in tensors.items()
    }
    save_torch_state_dict(own, directory, max_shard_size="5GB", metadata={"format": "pt"})


def write_tensors(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """One file of tensors, a pickle or safetensors by its suffix; appears complete or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without clone a view would be written with all it is a view of.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial = file.with_name(f".{file.name}.partial")
    try:
        if file.suffix == ".safetensors":
            save_file(plain, partial, metadata={"format": "pt"})
        else:
            torch.save(plain, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def config_for_disk(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's config as config.json, readable by transformers 5 and by 4.31, which LLaVA was written for.

    Old versions know `torch_dtype` and `rope_theta`, today's write `dtype` and `rope_parameters`: both are
    given. All fields of LLaMA and LLaVA are there, the reducer first of all; of the many that any model of
    transformers has, those that say something.
    """
    usual = PreTrainedConfig().to_dict()
    content = {
        name: value
        for name, value in config.to_dict().items()
        if name not in usual or value != usual[name] or name == "transformers_version"
    }
    if (dtype := content.get("dtype")) is not None:
        content["torch_dtype"] = dtype
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    return content


def save_full(
    model,
    tokenizer,
    out: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    include_tower: bool = True,
) -> None:
    """A whole model: config.json, generation_config.json, safetensors shards and the tokenizer.

    Args:
        model: LlavaLlamaForCausalLM, or a language model without vision.
        tokenizer: its tokenizer, or None.
        out: the directory.
        state_dict: the model's weights where they had to be gathered (ZeRO-3), named as in
            `model.state_dict()`.
        include_tower: with the tower's weights, as LLaVA's training saves them. They are read back only if
            the config says `unfreeze_mm_vision_tower`.
    """
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach() for name, tensor in state.items() if include_tower or TOWER not in name}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    with replacing(out) as directory:
        write_weights(tensors, directory)
        model.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)
        config = config_for_disk(model.config)
        write_json(directory / "config.json", {**config, "architectures": [type(model).__name__]})


def save_projector(
    model,
    out: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    file: str | Path | None = None,
) -> None:
    """What adapter tuning leaves: config.json and mm_projector.bin (`model.mm_projector.*`).

    With `mm_use_im_start_end` the input embeddings are trained too, and are in the file.

    Args:
        file: where the weights go if not to `out`/mm_projector.bin.
    """
    state = model.state_dict() if state_dict is None else state_dict
    wanted = ("mm_projector.", "embed_tokens.") if model.config.mm_use_im_start_end else ("mm_projector.",)
    tensors = {
        new: tensor
        for name, tensor in state.items()
        if (new := canonical_name(name)) is not None and any(part in new for part in wanted)
    }
    with replacing(out) as directory:
        if file is None:
            write_tensors(tensors, directory / PROJECTOR_FILES[1])
        write_json(directory / "config.json", config_for_disk(model.config))
    if file is not None:
        write_tensors(tensors, file)


def save_lora(
    model,
    out: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    non_lora_state_dict: Mapping[str, Tensor] | None = None,
    tokenizer=None,
) -> None:
    """What LoRA training leaves: the adapter as PEFT writes it, non_lora_trainables.bin, config.json.

    Args:
        model: the PeftModel around LlavaLlamaForCausalLM.
        state_dict: LoRA weights where they had to be gathered, named as in `model.state_dict()`.
        non_lora_state_dict: the other weights that were trained, named likewise
            (`base_model.model.model.mm_projector.*`). Default: every parameter that requires grad and is no
            LoRA weight, or the projector if none does.
        tokenizer: saved as well if given (released checkpoints have none).
    """
    if non_lora_state_dict is None:
        others = {
            name: p for name, p in model.named_parameters() if "lora_" not in name and TOWER not in name
        }
        non_lora_state_dict = {name: p for name, p in others.items() if p.requires_grad} or {
            name: p for name, p in others.items() if "mm_projector." in name
        }
    with replacing(out) as directory:
        # False: trained embeddings are in non_lora_trainables.bin; "auto" would ask the Hub about the base.
        model.save_pretrained(
            directory,
            state_dict=None if state_dict is None else dict(state_dict),
            save_embedding_layers=False,
        )
        write_tensors(non_lora_state_dict, directory / EXTRA_FILES[1])
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)
        write_json(directory / "config.json", config_for_disk(model.get_base_model().config))
