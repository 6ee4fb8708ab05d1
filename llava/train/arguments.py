"""The flags of a training run: transformers' and LLaVA's, read from a command line by `parse`.

argparse and transformers refuse values they do not know; refused here is what would go wrong silently, or
only after the model is loaded. What the user left open is decided in `llava.train.decisions`.
"""

from __future__ import annotations

import argparse
import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal, NoReturn

import transformers
from transformers import HfArgumentParser

from llava import hardware
from llava.conversation import conv_templates
from llava.data.text import training_template
from llava.errors import UserError, first_line
from llava.model.projector import build_projector
from llava.reducers import build_reducer
from llava.train.decisions import decide_accumulation, decide_precision, drop_missing_trackers


def flag(default: Any, text: str, **options: Any) -> Any:
    """A dataclass field with its --help; `options` are argparse's."""
    return field(default=default, metadata={"help": text, **options})


@dataclass
class ModelArguments:
    """Which model, which tower, which of their parts train."""

    model_name_or_path: str = flag("facebook/opt-125m", "language model, or LLaVA checkpoint, to start from")
    version: str = flag("v0", "conversation template the data is written in: plain, v1, ...")
    freeze_backbone: bool = flag(False, "freeze the language model's body; its head and the projector train")
    tune_mm_mlp_adapter: bool = flag(False, "train the projector and nothing else")
    vision_tower: str | None = flag(None, "vision tower: folder or hub name; default: the checkpoint's own")
    mm_vision_select_layer: int | None = flag(
        None, "hidden state of the tower to use, -2 for LLaVA-1.5; default: the checkpoint's, else -1"
    )
    pretrain_mm_mlp_adapter: str | None = flag(None, "mm_projector.bin of the pre-training stage")
    mm_projector_type: str | None = flag(
        None, "linear, mlpNx_gelu (LLaVA-1.5: mlp2x_gelu) or identity; default: the checkpoint's, else linear"
    )
    mm_use_im_start_end: bool = flag(False, "put <im_start> and <im_end> around each image")
    mm_use_im_patch_token: bool = flag(True, "add <im_patch> to the vocabulary (the released models do not)")
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] | None = flag(
        None, "how the crops of one image are joined; default: the checkpoint's, else flat"
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = flag(
        None, "patch: without CLS; cls_patch: with it; default: the checkpoint's, else patch"
    )
    mm_token_reducer: str | None = flag(
        None,
        "visual token reduction, such as prumerge+ or prumerge(ratio=0.125); several, separated by `;`: each "
        "batch draws one, and inference takes the first; default: what the checkpoint records, else none",
        aliases="--reducer",
    )


@dataclass
class DataArguments:
    """Which conversations and images."""

    data_path: str | None = flag(None, "conversations: JSON, JSONL or parquet")
    lazy_preprocess: bool = flag(False, "without effect: preprocessing is always lazy")
    is_multimodal: bool = flag(False, "without effect: there is always a vision tower")
    image_folder: str | None = flag(None, "folder of the images the data names")
    image_aspect_ratio: Literal["square", "pad"] = flag(
        "square", "pad: to a square before resizing (LLaVA-1.5); square: centre crop"
    )
    on_bad_sample: Literal["error", "skip"] = flag(
        "error", "a sample that cannot be used ends the run (error) or is replaced (skip)"
    )
    visual_cache: str | None = flag(None, "folder for visual tokens, made once before the first step")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' training arguments and LLaVA's own."""

    cache_dir: str | None = flag(None, "where downloaded models are kept")
    optim: str = flag("adamw_torch", "optimizer, by transformers' name")
    remove_unused_columns: bool = flag(False, "leave it: the collator chooses the columns")
    freeze_mm_mlp_adapter: bool = flag(False, "freeze the projector")
    mpt_attn_impl: str = flag("triton", "without effect (MPT models)")
    model_max_length: int = flag(512, "longest sequence in tokens, visual ones included; the rest is cut off")
    double_quant: bool = flag(True, "4-bit: quantize the quantization constants too")
    quant_type: Literal["nf4", "fp4"] = flag("nf4", "4-bit data type")
    bits: Literal[4, 8, 16] = flag(16, "4 (QLoRA) or 8: quantize the frozen language model")
    lora_enable: bool = flag(False, "LoRA on the language model's linear layers")
    lora_r: int = flag(64, "LoRA rank")
    lora_alpha: int = flag(16, "LoRA scale: alpha / r multiplies the update")
    lora_dropout: float = flag(0.05, "dropout before LoRA's A")
    lora_weight_path: str = flag("", "LoRA checkpoint to go on from (LLaVA reads this flag nowhere)")
    lora_bias: Literal["none", "all", "lora_only"] = flag("none", "which biases train beside LoRA")
    mm_projector_lr: float | None = flag(None, "learning rate of the projector, where it differs")
    group_by_modality_length: bool = flag(False, "batches of one modality and of similar length")
    # not LLaVA's
    precision: Literal["flags", "auto", "bf16", "fp16", "fp32"] = flag(
        "flags", "auto: the hardware's best; flags: as --bf16 and --fp16 say, else fp32"
    )
    attn_implementation: str | None = flag(None, "attention kernel; default: the hardware's best")
    global_batch_size: int | None = flag(None, "samples per optimizer step; sets gradient_accumulation_steps")
    loss_average: Literal["micro_batch", "token"] = flag(
        "micro_batch",
        "micro_batch: the mean of the micro batches' means, as LLaVA; "
        "token: every supervised token of the global batch weighs the same",
    )
    # transformers' flags under the names they had in transformers 4
    eval_strategy: str = flag("no", "only `no`: see `llava eval`", aliases="--evaluation_strategy")
    use_cpu: bool = flag(False, "train on the CPU", aliases="--no_cuda")
    warmup_ratio: float = flag(0.0, "old name of --warmup_steps below 1, which wins over it")
    # `llava`'s own --debug (the traceback of an error) takes no value, transformers' one does
    debug: str = flag("", "see transformers", nargs="?", const="")


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]

LIMITS: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, inf),
    "gradient_accumulation_steps": (1, inf),
    "model_max_length": (1, inf),
    "dataloader_num_workers": (0, inf),
    "lora_r": (1, inf),
    "lora_alpha": (1, inf),
    "lora_dropout": (0, 0.99),
    "warmup_ratio": (0, 1),
}
"""Least and largest values of flags that libraries would refuse only after the model is loaded, or never."""

REDUCERS_APART = ";"
"""Between the specs of `mm_token_reducer`."""

EXCLUSIVE: tuple[tuple[str, str, str], ...] = (
    ("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "nothing would train"),
    ("tune_mm_mlp_adapter", "lora_enable", "the first trains only the projector"),
    ("tune_mm_mlp_adapter", "mm_use_im_start_end", "the new tokens' rows would have to train alone"),
    ("deepspeed", "fsdp", "both shard the model"),
)
"""Pairs of flags that cannot be given together, and why."""

PATHS: dict[str, tuple[Callable[[Path], bool], str]] = {
    "image_folder": (Path.is_dir, "folder"),
    "pretrain_mm_mlp_adapter": (Path.is_file, "file; scripts/v1_5/pretrain.sh writes it"),
    "lora_weight_path": (Path.is_dir, "folder of a LoRA checkpoint"),
    "resume_from_checkpoint": (Path.is_dir, "checkpoint folder"),
}
"""What has to be there, and what it is."""


class Parser(HfArgumentParser):
    """argparse's errors as UserError; its usage would be hundreds of lines here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; `llava train --help` lists the flags.")


def build_parser() -> Parser:
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)
    return Parser(
        kinds,
        prog="llava train",
        description="Train a LLaVA: projector, full fine-tuning, LoRA or QLoRA.",
    )


def parse(argv: Sequence[str], say: Callable[[str], None] = print) -> Arguments:
    """Read a training command line.

    Args:
        argv: the command line without the program's name.
        say: called with each decision that was taken for the user, one sentence each.

    Raises:
        UserError: what the user asked for cannot be done; the sentence names the flag.
    """
    parser = build_parser()
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag, [f"--{name}" for name in vars(values)], n=1)
        parser.error(f"there is no flag {flag}" + "".join(f"; did you mean {name}?" for name in near))
    given = {token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")}
    _refuse(values)
    if values.warmup_ratio and not values.warmup_steps:
        values.warmup_steps = min(values.warmup_ratio, 1 - 1e-9)  # below 1 it is a ratio, 1 is one step
    decide_precision(values, given, say)
    decide_accumulation(values, given, say)
    drop_missing_trackers(values, say)
    try:
        with warnings.catch_warnings():
            # gradient_checkpointing is LLaVA's spelling, and the only one that transformers below 5.23 knows.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
            model, data, training = parser.parse_dict(vars(values))
    except (ValueError, OSError, ImportError) as error:
        raise UserError(first_line(error)) from error
    if training.bits != 16:
        _refuse_bits(model, training)
    if training_template(model.version) is not conv_templates.get(model.version):
        say(f"--version {model.version}: the data are written as vicuna_v1, as in LLaVA")
    return model, data, training


def _refuse(values: argparse.Namespace) -> None:
    for flag in ("output_dir", "data_path"):
        if not getattr(values, flag):
            raise UserError(f"--{flag} is missing.")
    for flag, (there, what) in PATHS.items():
        path = getattr(values, flag)
        if path and path not in ("True", "true") and not there(Path(path)):
            raise UserError(f"--{flag} {path}: there is no such {what}.")
    for flag, (least, most) in LIMITS.items():
        if not least <= (value := getattr(values, flag)) <= most:
            limits = f"at least {least}" if most == inf else f"from {least} to {most}"
            raise UserError(f"--{flag} {value}: a value of {limits} is needed.")
    for one, other, why in EXCLUSIVE:
        if getattr(values, one) and getattr(values, other):
            raise UserError(f"--{one} and --{other} exclude one another: {why}.")
    if values.lora_weight_path and not values.lora_enable:
        raise UserError("--lora_weight_path goes on with a LoRA: add --lora_enable True.")
    if values.eval_strategy != "no":
        raise UserError(
            f"--eval_strategy {values.eval_strategy}: a run has no evaluation data; see `llava eval`."
        )
    try:
        if values.mm_projector_type is not None:
            build_projector(values.mm_projector_type, 1, 1)
        if values.mm_token_reducer is not None:
            specs = values.mm_token_reducer.split(REDUCERS_APART)
            values.mm_token_reducer = REDUCERS_APART.join(build_reducer(spec).spec for spec in specs)
    except ValueError as error:
        raise UserError(f"--mm_token_reducer: {error}") from error


def _refuse_bits(model: ModelArguments, training: TrainingArguments) -> None:
    if not (training.lora_enable or model.tune_mm_mlp_adapter):
        raise UserError(f"--bits {training.bits} freezes the language model: add --lora_enable True.")
    if (training.deepspeed and training.hf_deepspeed_config.is_zero3()) or training.fsdp:
        raise UserError(
            f"--bits {training.bits}: ZeRO-3 and FSDP cannot shard quantized weights; "
            "use --deepspeed scripts/zero2.json, or none."
        )
    if training.bits == 8 and not hardware.supports_llm_int8("cpu" if training.use_cpu else None):
        raise UserError(
            "--bits 8 (LLM.int8) needs a GPU of compute capability 7.5 (a V100 has 7.0): use --bits 4."
        )
