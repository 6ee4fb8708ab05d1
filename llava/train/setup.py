"""The model made ready for one training stage: what is frozen, what trains, in which dtype.

`build` loads language model, tower and projector; `choose_trainables` is the one place where `requires_grad`
is decided; `describe` says the outcome in a few lines, which a run logs before its first step.

Dtypes. What is frozen is kept in the dtype we compute in. What trains is float32: under mixed precision small
updates would be lost in a half-precision weight, and float16's loss scaling needs float32 gradients.
DeepSpeed keeps float32 masters itself and wants one dtype throughout, so there everything has the dtype we
compute in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed

from llava.data import LazySupervisedDataset
from llava.errors import UserError
from llava.model.checkpoints import (
    KINDS,
    CheckpointInfo,
    inspect_checkpoint,
    llava_config_dict,
    read_adapter,
    read_json,
    read_model_weights,
    read_projector,
    resolve_directory,
)
from llava.model.llava_arch import LlavaMetaConfig, LlavaMetaForCausalLM
from llava.model.load import build_config, load_language_model, quantization, tokenizer_of, tower_of
from llava.reducers import Reducer
from llava.train.arguments import REDUCERS_APART, DataArguments, ModelArguments, TrainingArguments

if TYPE_CHECKING:
    from peft import PeftModel  # imported where it is needed: it takes seconds

Stage = Literal["projector", "full", "lora"]
Say = Callable[[str], None]

REDUCER_CHOICES = "mm_token_reducer_choices"
"""Field of the config of a model that was trained with several reducers; `mm_token_reducer` is the first."""

NOT_LANGUAGE_MODEL = r".*(vision_tower|mm_projector|image_newline).*"
"""Names LoRA stays away from."""

DEFAULTS = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_token_reducer": "none",
}
"""What these flags of LLaVA's mean where neither the command line nor the checkpoint says."""


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, with what goes with it.

    Attributes:
        reducers: each batch draws one of them; the more often one is named, the likelier it is.
    """

    model: LlavaMetaForCausalLM | PeftModel
    tokenizer: PreTrainedTokenizerFast
    stage: Stage
    reducers: Sequence[Reducer]

    @property
    def llava(self) -> LlavaMetaForCausalLM:
        """The model without PEFT's wrapping."""
        model: Any = self.model
        return model if isinstance(model, LlavaMetaForCausalLM) else model.get_base_model()


def compute_dtype(training: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def build(model: ModelArguments, data: DataArguments, training: TrainingArguments, say: Say) -> Prepared:
    """Load everything and decide what trains.

    Raises:
        UserError: a file is missing or does not fit, or nothing would train.
    """
    stage: Stage = "projector" if model.tune_mm_mlp_adapter else "lora" if training.lora_enable else "full"
    info = _base(model.model_name_or_path)
    config = _config(info, model, data, training, say)
    tokenizer = _tokenizer(info, config, model, training)
    weights = read_model_weights(info)

    dtype = compute_dtype(training)
    own_masters = training.deepspeed is None  # DeepSpeed keeps float32 copies itself
    options: dict[str, Any] = {
        "dtype": torch.float32 if stage == "full" and own_masters else dtype,
        "attn_implementation": training.attn_implementation,
    }
    if training.bits in (4, 8):
        options["quantization_config"] = quantization(
            training.bits, dtype, double_quant=training.double_quant, quant_type=training.quant_type
        )
        options["device_map"] = {"": training.device}  # quantized weights cannot be moved later
    llava = load_language_model(info, config, weights, num_tokens=len(tokenizer), **options)
    named = model.mm_token_reducer
    specs = (
        named.split(REDUCERS_APART)
        if named
        else getattr(config, REDUCER_CHOICES, None) or [llava.reducer.spec]
    )
    reducers = [llava.make_reducer(spec, allow_files=named is not None) for spec in specs]
    if named is not None:
        llava.set_reducer(specs[0])
    if len(specs) > 1:
        setattr(llava.config, REDUCER_CHOICES, specs)
    tower = tower_of(info, config, weights, model.vision_tower, device=llava.device, dtype=dtype)
    set_seed(training.seed)  # a new projector's start; how many numbers loading drew depends on sharding
    llava.set_vision_tower(tower)
    if model.pretrain_mm_mlp_adapter:
        _load_projector(llava, Path(model.pretrain_mm_mlp_adapter), "--pretrain_mm_mlp_adapter")

    trainable = _with_lora(llava, training) if stage == "lora" else llava
    if training.lora_weight_path:
        _load_lora(trainable, Path(training.lora_weight_path), training)
    choose_trainables(llava, stage, model, training)
    _cast(trainable, training)
    for line in describe(trainable):
        say(line)
    return Prepared(trainable, tokenizer, stage, reducers)


def open_dataset(
    prepared: Prepared, model: ModelArguments, data: DataArguments, **options: Any
) -> LazySupervisedDataset:
    """The samples of `--data_path` for a prepared model. `options`: further keywords of the dataset."""
    return LazySupervisedDataset(
        data.data_path,
        prepared.tokenizer,
        prepared.llava.get_vision_tower().image_processor,
        image_folder=data.image_folder,
        version=model.version,
        image_aspect_ratio=data.image_aspect_ratio,
        mm_use_im_start_end=model.mm_use_im_start_end,
        **options,
    )


# What is loaded


def _base(name: str) -> CheckpointInfo:
    info = inspect_checkpoint(resolve_directory(name, remedy="--model_name_or_path PATH"))
    if info.kind in ("plain_lm", "full"):
        return info
    raise UserError(
        f"--model_name_or_path {name} is {KINDS[info.kind]}: give a language model or a whole LLaVA "
        "checkpoint (`llava tools merge-lora` and `llava tools convert` make one); a LoRA is trained further "
        "by --lora_weight_path."
    )


def _config(
    info: CheckpointInfo,
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    say: Say,
) -> LlavaMetaConfig:
    """The base's config with the run's choices: a flag that was given, else the checkpoint's value, else
    `DEFAULTS`."""
    recorded = llava_config_dict(info)
    tower = model.vision_tower or recorded.get("mm_vision_tower")
    if tower is None and not info.is_llava:
        raise UserError("--vision_tower is missing: the language model has none of its own.")
    chosen: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        given, known = getattr(model, name), recorded.get(name)
        chosen[name] = given if given is not None else known if known is not None else default
        if given is None and known not in (None, default):
            say(f"{name} {known}: the checkpoint's (pass --{name} to change it)")
    if info.is_llava and recorded.get("mm_projector_type", "linear") != chosen["mm_projector_type"]:
        raise UserError(
            f"--mm_projector_type {chosen['mm_projector_type']}: the checkpoint's projector is "
            f"{recorded.get('mm_projector_type', 'linear')}; leave the flag out."
        )
    chosen |= {
        "mm_vision_tower": tower,
        "use_mm_proj": True,
        "image_aspect_ratio": data.image_aspect_ratio,
        "mm_use_im_start_end": model.mm_use_im_start_end,
        "mm_use_im_patch_token": model.mm_use_im_patch_token,
        "mm_projector_lr": training.mm_projector_lr,
        "tune_mm_mlp_adapter": model.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": training.freeze_mm_mlp_adapter,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": training.model_max_length,
    }
    dropped = ("dtype", "torch_dtype", "quantization_config")
    kept = {name: value for name, value in recorded.items() if name not in dropped}
    if model.mm_token_reducer is not None:
        chosen["mm_token_reducer"] = "none"  # what the user names is set later: it may be in a file
        kept.pop(REDUCER_CHOICES, None)
    config = build_config({**kept, **chosen}, info)
    config._name_or_path = model.model_name_or_path
    return config


def _tokenizer(
    info: CheckpointInfo, config: LlavaMetaConfig, model: ModelArguments, training: TrainingArguments
) -> PreTrainedTokenizerFast:
    """The base's tokenizer with the tokens LLaVA adds. It pads with <unk> where there is one; version v0 with
    a [PAD] of its own where the files name no pad token."""
    options: dict[str, Any] = {"model_max_length": training.model_max_length, "padding_side": "right"}
    files = [info.path / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    has_pad = any(read_json(file).get("pad_token") is not None for file in files if file.is_file())
    if model.version == "v0" and not has_pad:
        options["pad_token"] = "[PAD]"
    tokenizer = tokenizer_of(info, config, **options)
    if model.version != "v0" and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def _load_projector(llava: LlavaMetaForCausalLM, file: Path, flag: str) -> None:
    """The projector's weights in a file (and those of the tokens that were added, where there are any)."""
    found = read_projector(file).tensors
    wanted = dict(llava.get_model().mm_projector.named_parameters(prefix="model.mm_projector"))
    if "model.embed_tokens.weight" in found:
        wanted["model.embed_tokens.weight"] = llava.get_input_embeddings().weight
    shapes = {name: tuple(full_shape(parameter)) for name, parameter in wanted.items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != given:
        raise UserError(
            f"{flag} {file} does not fit: it holds {given}, needed are {shapes}; "
            "check --mm_projector_type, --vision_tower and the language model."
        )
    with torch.no_grad(), gathered(list(wanted.values()), modify=True):
        for name, parameter in wanted.items():
            if parameter.numel():
                parameter.copy_(found[name])


def _load_lora(model: Any, folder: Path, training: TrainingArguments) -> None:
    """Adapter and projector of a LoRA checkpoint, which training goes on from."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    info = inspect_checkpoint(folder)
    if info.kind != "lora":
        raise UserError(f"--lora_weight_path {folder} is {KINDS[info.kind]}: give a LoRA checkpoint.")
    adapter = read_json(folder / "adapter_config.json")
    rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
    if (rank, alpha) != (training.lora_r, training.lora_alpha):
        raise UserError(
            f"--lora_weight_path {folder} has rank {rank} and alpha {alpha}: "
            f"give --lora_r {rank} --lora_alpha {alpha}."
        )
    weights = read_adapter(info)
    # Without embeddings: PEFT adds them where the vocabulary has grown, and an adapter's file has none.
    adapted = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {name: tuple(tensor.shape) for name, tensor in adapted.items()}
    if own != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        raise UserError(f"--lora_weight_path {folder} does not fit: it is of another language model.")
    set_peft_model_state_dict(model, weights)
    _load_projector(model.get_base_model(), folder / "non_lora_trainables.bin", "--lora_weight_path")


# What trains


def _with_lora(llava: LlavaMetaForCausalLM, training: TrainingArguments) -> PeftModel:
    """LoRA on every linear layer of the language model but its head."""
    from peft import LoraConfig, get_peft_model

    # Last name parts of the layers' linear modules: q_proj ... down_proj. bitsandbytes' are subclasses.
    named = llava.get_model().layers.named_modules()
    targets = {name.rpartition(".")[2] for name, module in named if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        bias=training.lora_bias,
        target_modules=sorted(targets),
        exclude_modules=NOT_LANGUAGE_MODEL,
        task_type="CAUSAL_LM",
    )
    set_seed(training.seed)  # LoRA's start
    # DeepSpeed wants one dtype throughout; otherwise `_cast` makes float32 of what trains.
    return get_peft_model(llava, config, autocast_adapter_dtype=False)


def choose_trainables(
    llava: LlavaMetaForCausalLM, stage: Stage, model: ModelArguments, training: TrainingArguments
) -> None:
    """Sets `requires_grad` of every parameter that is no LoRA weight (PEFT has set those).

    projector: the projector alone. lora: the projector beside the LoRA weights. full: all but the tower, with
    `freeze_backbone` the head and the projector. `freeze_mm_mlp_adapter` freezes the projector. The tower
    never trains.

    Raises:
        UserError: nothing is left that trains.
    """
    body = llava.get_model()
    if stage != "lora":
        llava.requires_grad_(stage == "full")
        if model.freeze_backbone:
            body.requires_grad_(False)
    vision: list[Any] = [body.mm_projector, *([body.image_newline] if body.image_newline is not None else [])]
    for part in vision:
        part.requires_grad_(not training.freeze_mm_mlp_adapter)
    body.vision_tower.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in llava.parameters()):
        raise UserError("Nothing trains: every part is frozen by the flags given.")


def _cast(model: nn.Module, training: TrainingArguments) -> None:
    """Trainable parameters to float32, unless DeepSpeed holds float32 copies of them; norms of a quantized
    model too, as QLoRA does."""
    trained_dtype = torch.float32 if training.deepspeed is None else compute_dtype(training)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # ZeRO-3 has cast its own
            parameter.data = parameter.data.to(trained_dtype)
        elif training.bits != 16 and "norm" in name and "vision_tower" not in name:
            parameter.data = parameter.data.float()


def describe(model: nn.Module) -> list[str]:
    """How many parameters train and how many are frozen, one line per part and dtype."""
    names = {"lora_": "LoRA", "vision_tower": "vision tower", "mm_projector": "projector"}
    counts: Counter[tuple[str, str, torch.dtype]] = Counter()
    for name, parameter in model.named_parameters():
        part = next((names[key] for key in names if key in name), "language model")
        does = "trains" if parameter.requires_grad else "frozen"
        counts[part, does, parameter.dtype] += full_shape(parameter).numel()
    trained = sum(number for (_, does, _), number in counts.items() if does == "trains")
    lines = [f"{part}: {does} {number:,} ({dtype})" for (part, does, dtype), number in counts.items()]
    return [*lines, f"in all {trained:,} of {counts.total():,} parameters train"]


# ZeRO-3 keeps each parameter cut up over the processes


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 holds only a piece of it."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def gathered(parameters: list[nn.Parameter], *, modify: bool = False) -> AbstractContextManager[Any]:
    """Whole parameters inside the block, on every process; a change by the main one is handed back.

    Without ZeRO-3, or for parameters that are not cut up, nothing is done.
    """
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if modify else None)
