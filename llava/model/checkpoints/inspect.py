"""What a directory holds, by what is in it and never by what it is called."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava import files
from llava.errors import UserError
from llava.model.checkpoints.locate import resolve_beside, resolve_directory

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

LLAVA_HF_TYPES = ("llava", "llava_next")
"""`model_type` of the classes of transformers whose checkpoints can be read: LLaVA-1.5 and LLaVA-1.6."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: not there, not JSON, or not an object.
    """
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object: download it again")
    return content


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
        base: what the base is, where one is needed and known.
    """

    path: Path
    kind: str
    config: dict[str, Any] = field(repr=False)
    weights: Path | None = None
    adapter: Path | None = None
    adapter_config: dict[str, Any] = field(default_factory=dict, repr=False)
    extra: Path | None = None
    base: "CheckpointInfo | None" = None

    @property
    def needs_base(self) -> bool:
        return self.kind in ("lora", "projector")

    @property
    def declared_base(self) -> str:
        """The base the checkpoint names itself, "" if none."""
        named = {
            "lora": self.adapter_config.get("base_model_name_or_path"),
            "projector": self.config.get("_name_or_path"),
        }
        return named.get(self.kind) or ""

    @property
    def has_tokenizer(self) -> bool:
        return _first_file(self.path, TOKENIZER_FILES) is not None

    @property
    def is_llava(self) -> bool:
        """Whether the model it loads into takes images."""
        if self.kind == "lora":
            return describes_llava(self.config) or (self.base is not None and self.base.is_llava)
        return self.kind in ("full", "projector", "llava_hf")

    @property
    def llava_config(self) -> "CheckpointInfo":
        """Whose config describes the model: this checkpoint, or the base of adapters without a config."""
        if self.base is not None and not describes_llava(self.config) and self.base.is_llava:
            return self.base
        return self

    @property
    def files(self) -> list[Path]:
        """The files that hold weights, the base's not included."""
        own = [file for file in (self.adapter, self.extra) if file is not None]
        return [*(shards_of(self.weights) if self.weights is not None else []), *own]

    def require_base(self) -> "CheckpointInfo":
        """The base.

        Raises:
            UserError: none was given, and none is recorded that lies on this machine.
        """
        if self.base is not None:
            return self.base
        of = f", trained on {self.declared_base}" if self.declared_base else ""
        raise UserError(
            f"{self.path} is {KINDS[self.kind]}{of}: pass that language model with "
            f"--model-base {self.declared_base or 'PATH'} (model_base=)"
        )


def describes_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of LLaVA's own format."""
    names = [str(config.get("model_type")), *(config.get("architectures") or [])]
    return bool(config.get("mm_vision_tower")) or any(name.lower().startswith("llava") for name in names)


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
        raise UserError(
            f"--model-base {base_directory} is {KINDS[base_info.kind]}, not a language model to apply "
            f"{directory} to (`llava tools merge-lora` makes one of LoRA adapters and their base)"
        )
    return replace(info, base=base_info)


def inspect_model(path: str | Path, base: str | Path | None = None) -> CheckpointInfo:
    """A checkpoint that is, perhaps with its base, a LLaVA or a language model.

    Raises:
        UserError: as `inspect_checkpoint`; it is a tower, or its base is not known.
    """
    info = inspect_checkpoint(path, base)
    if info.kind == "vision_tower":
        raise UserError(f"{info.path} is {KINDS[info.kind]}, not a model that answers")
    if info.needs_base:
        info.require_base()
    return info


def _inspect_one(directory: Path) -> CheckpointInfo:
    config_file, adapter_config_file = directory / "config.json", directory / "adapter_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    weights = _first_file(directory, WEIGHT_FILES)
    adapter, projector = _first_file(directory, ADAPTER_FILES), _first_file(directory, PROJECTOR_FILES)
    if weights is None and (shards := sorted(file.name for file in directory.glob("*-of-*"))):
        raise UserError(
            f"{directory} has shards of a model ({shards[0]}, ...) but no index ({WEIGHT_FILES[1]} or "
            f"{WEIGHT_FILES[3]}): download it"
        )
    if weights is None and (adapter is not None or adapter_config_file.exists()):
        settings = read_json(adapter_config_file)
        if adapter is None:
            raise UserError(
                f"{directory} has adapter_config.json but no {ADAPTER_FILES[0]} or .bin: download it again"
            )
        extra = _first_file(directory, EXTRA_FILES)
        return CheckpointInfo(
            directory, "lora", config, adapter=adapter, adapter_config=settings, extra=extra
        )

    if not config:
        raise UserError(f"{directory} has no config.json: pass the directory of a checkpoint")
    if config.get("model_type") in TOWER_TYPES:
        return CheckpointInfo(directory, "vision_tower", config, weights)
    architectures = config.get("architectures") or []
    if "vision_config" in config and "text_config" in config:
        kind = "llava_hf" if config.get("model_type") in LLAVA_HF_TYPES else None
    elif describes_llava(config):
        kind = "projector" if weights is None and projector is not None else "full"
    else:
        is_causal = "vocab_size" in config or any(name.endswith("ForCausalLM") for name in architectures)
        kind = "plain_lm" if is_causal else None
    if kind is None:
        described = architectures[0] if architectures else config.get("model_type", "unknown model")
        raise UserError(
            f"{directory} holds a {described}, which is not a LLaVA of ours or of transformers "
            f"({', '.join(LLAVA_HF_TYPES)}), not a language model and not a vision tower"
        )
    if kind == "projector":
        return CheckpointInfo(directory, kind, config, extra=projector)
    if weights is None:
        raise UserError(
            f"{directory} has a config.json but no weights ({', '.join(WEIGHT_FILES)}; a projector would be "
            f"{PROJECTOR_FILES[1]}, LoRA adapters {ADAPTER_FILES[0]}): download it again"
        )
    return CheckpointInfo(directory, kind, config, weights)


def _first_file(directory: Path, names: Iterable[str]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


def shards_of(weights: Path) -> list[Path]:
    """The files of a model: itself, or those its index names."""
    if weights.suffix != ".json":
        return [weights]
    weight_map = read_json(weights).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{weights} has no weight_map: download it again")
    return [weights.parent / name for name in sorted(set(weight_map.values()))]
