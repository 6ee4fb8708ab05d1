"""What a training run is told: LLaVA's flags, their old spellings, and checks that name the flag at fault.

`parse(argv)` is the only way in. It translates spellings that transformers 5 no longer knows, lets
`llava.hardware` choose what the user left open (precision, attention, device), turns `--global_batch_size`
into an accumulation, and refuses combinations that could only fail later.

Flags of transformers' own TrainingArguments are accepted as they are; the tables below add LLaVA's.
"""

from __future__ import annotations

import difflib
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import transformers
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from llava import hardware
from llava.conversation import conv_templates
from llava.data.text import training_template
from llava.errors import UserError, first_line
from llava.model.projector import build_projector
from llava.reducers import build_reducer


def _help(text: str, *aliases: str) -> dict[str, object]:
    return {"help": text, "aliases": list(aliases)} if aliases else {"help": text}


@dataclass
class ModelArguments:
    """Which model, which tower, which of their parts train."""

    model_name_or_path: str = field(
        default="facebook/opt-125m", metadata=_help("language model, or LLaVA checkpoint, to start from")
    )
    version: str = field(
        default="v0", metadata=_help("conversation template the data is written in: plain, v1, ...")
    )
    freeze_backbone: bool = field(
        default=False, metadata=_help("freeze the language model's body; its head and the projector train")
    )
    tune_mm_mlp_adapter: bool = field(default=False, metadata=_help("train the projector and nothing else"))
    vision_tower: str | None = field(
        default=None, metadata=_help("vision tower: folder or hub name; default: the checkpoint's own")
    )
    mm_vision_select_layer: int | None = field(
        default=None,
        metadata=_help(
            "hidden state of the tower to use, -2 for LLaVA-1.5; default: the checkpoint's, else -1"
        ),
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata=_help("mm_projector.bin of the pre-training stage")
    )
    mm_projector_type: str | None = field(
        default=None,
        metadata=_help(
            "linear, mlpNx_gelu (LLaVA-1.5: mlp2x_gelu) or identity; default: the checkpoint's, else linear"
        ),
    )
    mm_use_im_start_end: bool = field(
        default=False, metadata=_help("put <im_start> and <im_end> around each image")
    )
    mm_use_im_patch_token: bool = field(
        default=True, metadata=_help("add <im_patch> to the vocabulary (the released models do not)")
    )
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] | None = field(
        default=None,
        metadata=_help("how the crops of one image are joined; default: the checkpoint's, else flat"),
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = field(
        default=None,
        metadata=_help("patch: without CLS; cls_patch: with it; default: the checkpoint's, else patch"),
    )
    mm_token_reducer: str | None = field(
        default=None,
        metadata=_help(
            "visual token reduction, such as prumerge+ or prumerge(ratio=0.125); "
            "default: what the checkpoint records, else none",
            "--reducer",
        ),
    )


@dataclass
class DataArguments:
    """Which conversations and images."""

    data_path: str | None = field(default=None, metadata=_help("conversations: JSON, JSONL or parquet"))
    lazy_preprocess: bool = field(
        default=False, metadata=_help("accepted and without effect: preprocessing is always lazy")
    )
    is_multimodal: bool = field(default=False, metadata=_help("set by itself where there is a vision tower"))
    image_folder: str | None = field(
        default=None, metadata=_help("folder the `image` entries of the data are relative to")
    )
    image_aspect_ratio: Literal["square", "pad"] = field(
        default="square", metadata=_help("pad: to a square before resizing (LLaVA-1.5); square: centre crop")
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error",
        metadata=_help(
            "a sample that cannot be used stops the run (error) or is replaced and counted (skip)"
        ),
    )
    visual_cache: str | None = field(
        default=None,
        metadata=_help(
            "folder for reduced visual tokens, computed once before training; the tower never runs again"
        ),
    )
    visual_cache_batch_size: int = field(
        default=16, metadata=_help("images per batch while the visual cache is filled")
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' training arguments and LLaVA's own."""

    cache_dir: str | None = field(default=None, metadata=_help("where downloaded models are kept"))
    optim: str = field(default="adamw_torch", metadata=_help("optimizer, by transformers' name"))
    remove_unused_columns: bool = field(
        default=False, metadata=_help("has to be False: we collate ourselves")
    )
    freeze_mm_mlp_adapter: bool = field(default=False, metadata=_help("freeze the projector"))
    mpt_attn_impl: str = field(default="triton", metadata=_help("accepted and without effect (MPT models)"))
    model_max_length: int = field(
        default=512, metadata=_help("longest sequence in tokens, visual ones included; the rest is cut off")
    )
    double_quant: bool = field(default=True, metadata=_help("4-bit: quantize the quantization constants too"))
    quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata=_help("4-bit data type"))
    bits: int = field(default=16, metadata=_help("4 (QLoRA) or 8: quantize the frozen language model"))
    lora_enable: bool = field(default=False, metadata=_help("LoRA on the language model's linear layers"))
    lora_r: int = field(default=64, metadata=_help("LoRA rank"))
    lora_alpha: int = field(default=16, metadata=_help("LoRA scale: alpha / r multiplies the update"))
    lora_dropout: float = field(default=0.05, metadata=_help("dropout before LoRA's A"))
    lora_weight_path: str = field(default="", metadata=_help("accepted and without effect, as in LLaVA"))
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata=_help("which biases train beside the LoRA matrices")
    )
    mm_projector_lr: float | None = field(
        default=None, metadata=_help("learning rate of the projector, where it differs")
    )
    group_by_modality_length: bool = field(
        default=False, metadata=_help("batches of one modality and of similar length")
    )
    # ours
    precision: Literal["flags", "auto", "bf16", "fp16", "fp32"] = field(
        default="flags",
        metadata=_help("auto: what the hardware does best; flags: what --bf16 and --fp16 say (fp32 without)"),
    )
    attn_implementation: str | None = field(
        default=None, metadata=_help("attention kernel; default: what the hardware and the precision allow")
    )
    global_batch_size: int | None = field(
        default=None,
        metadata=_help("samples per optimizer step over all processes; sets gradient_accumulation_steps"),
    )
    loss_average: Literal["micro_batch", "token"] = field(
        default="micro_batch",
        metadata=_help(
            "micro_batch: mean over processes and accumulation of each micro batch's mean, as LLaVA; "
            "token: every supervised token of the global batch weighs the same"
        ),
    )


AT_LEAST: dict[str, int] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "model_max_length": 1,
    "visual_cache_batch_size": 1,
    "dataloader_num_workers": 0,
    "lora_r": 1,
    "lora_alpha": 1,
}
"""The least these flags can mean; libraries would say so only after the model is loaded, or not at all."""

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


# --- Old spellings

RENAMED: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "torch_compile_dynamic": "torch_compile",
    "attention_implementation": "attn_implementation",
}
"""Flags that only changed their name."""

WITHOUT_EFFECT: dict[str, str] = {
    "overwrite_output_dir": "a run resumes from the last checkpoint in --output_dir, if there is one",
    "logging_dir": "TensorBoard reads the TENSORBOARD_LOGGING_DIR environment variable",
    "save_safetensors": "weights are saved as safetensors",
    "half_precision_backend": "there is one",
    "fp16_backend": "there is one",
    "fp16_opt_level": "it belonged to apex",
    "use_mps_device": "an Apple GPU is found by itself",
    "use_legacy_prediction_loop": "it is gone",
    "tokenizer": "the tokenizer is the model's",
    "dispatch_batches": "every process reads its own batches",
    "split_batches": "every process reads its own batches",
    "include_tokens_per_second": "text and visual tokens per second are always logged",
}
"""Flags of transformers 4 that are accepted, said to have no effect, and dropped."""


def translate(argv: Sequence[str], say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Rewrite transformers 4's spellings as transformers 5's.

    Args:
        argv: command line without the program's name; `--flag value`, `--flag=value` and dashes inside names.
        say: called with one sentence per flag that is dropped.

    Returns:
        The command line in today's spelling. A given `warmup_steps` > 0 wins over `warmup_ratio`, as it did.

    Raises:
        UserError: a value that the old flag did not take either.
    """
    result: list[str] = []
    for name, values, tokens in _split(argv):
        if name == "debug" and not values:
            continue  # `llava`'s own: show the traceback of an error
        if name == "warmup_ratio":
            result += _warmup(values)
        elif name == "group_by_length":
            if _truth(name, values):
                result += ["--train_sampling_strategy", "group_by_length"]
        elif name in WITHOUT_EFFECT:
            say(f"--{name} has no effect any more: {WITHOUT_EFFECT[name]}")
        elif name in RENAMED:
            result += [f"--{RENAMED[name]}", *values]
        else:
            result += tokens
    return result


def _split(argv: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """Cut a command line into flags: (name with underscores, values, tokens as given)."""
    pieces: list[tuple[str, list[str], list[str]]] = []
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            pieces.append((name.replace("-", "_"), [value] if equals else [], [token]))
        elif pieces:
            pieces[-1][1].append(token)
            pieces[-1][2].append(token)
        else:
            pieces.append(("", [], [token]))
    return pieces


def _truth(name: str, values: list[str]) -> bool:
    """A boolean flag's value; the flag alone is True."""
    value = values[0].lower() if values else "true"
    if value not in ("true", "false", "1", "0", "yes", "no", "t", "f", "y", "n"):
        raise UserError(f"--{name} {values[0]}: True or False is expected.")
    return value in ("true", "1", "yes", "t", "y")


def _warmup(values: list[str]) -> list[str]:
    try:
        ratio = float(values[0])
    except (IndexError, ValueError):
        raise UserError(f"--warmup_ratio {' '.join(values)}: a number from 0 up to 1 is expected.") from None
    if not 0 <= ratio <= 1:
        raise UserError(f"--warmup_ratio {values[0]}: a number from 0 up to 1 is expected.")
    # transformers 5 reads warmup_steps below 1 as a ratio, and 1 as one step.
    return ["--warmup_steps", str(min(ratio, 1 - 1e-9))]


# --- Parsing


class _Parser(HfArgumentParser):
    """argparse's errors as one sentence; its usage would be hundreds of lines here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; `llava train --help` lists the flags.")


def build_parser() -> HfArgumentParser:
    return _Parser(
        (ModelArguments, DataArguments, TrainingArguments),
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
    argv = translate(argv, say)
    given = {name for name, _, _ in _split(argv)}
    if {"warmup_steps"} & given:
        argv = _one_warmup(argv)
    parser = build_parser()
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_unknown(unknown[0], parser)
    _check_before(values)
    _decide_hardware(values, given, say)
    _decide_accumulation(values, given, say)
    _decide_reporting(values, say)
    try:
        with warnings.catch_warnings():
            # gradient_checkpointing is LLaVA's spelling, and the only one that transformers below 5.23 knows.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
            arguments = parser.parse_dict(vars(values))
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise UserError(first_line(error)) from error
    model, data, training = arguments
    check(model, data, training)
    if training_template(model.version) is not conv_templates.get(model.version):
        say(f"--version {model.version}: the data are written as vicuna_v1, as in LLaVA")
    return model, data, training


def _one_warmup(argv: list[str]) -> list[str]:
    """Of a translated warmup_ratio and a warmup_steps keep the latter where it is above 0."""
    pieces = _split(argv)
    asked = [values for name, values, _ in pieces if name == "warmup_steps" and values]
    try:
        best = max(asked, key=lambda values: float(values[0]))
    except ValueError:
        return argv  # argparse says it better
    rest = [token for name, _, tokens in pieces if name != "warmup_steps" for token in tokens]
    return [*rest, "--warmup_steps", best[0]]


def _refuse_unknown(token: str, parser: HfArgumentParser) -> None:
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(token.split("=")[0].replace("-", "_").replace("__", "--", 1), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"There is no flag {token}.{hint} `llava train --help` lists them.")


def _check_before(values: Namespace) -> None:
    """Checks that come before transformers', because theirs do not name the flag."""
    if values.fp16 and values.bf16:
        raise UserError("--fp16 and --bf16 exclude one another: give one, or --precision auto.")
    for flag in ("bf16", "fp16"):
        if getattr(values, flag) and values.precision not in ("flags", "auto", flag):
            raise UserError(
                f"--{flag} True and --precision {values.precision} contradict one another: give one."
            )
    if not values.output_dir:
        raise UserError("--output_dir is missing: where should the result go?")
    if (
        isinstance(values.deepspeed, str)
        and not values.deepspeed.startswith("{")
        and not Path(values.deepspeed).is_file()
    ):
        raise UserError(
            f"--deepspeed {values.deepspeed}: there is no such file (scripts/zero2.json, scripts/zero3.json)."
        )
    for flag, least in AT_LEAST.items():
        if getattr(values, flag) < least:
            raise UserError(f"--{flag} {getattr(values, flag)}: at least {least} is needed.")
    if not 0 <= values.lora_dropout < 1:
        raise UserError(f"--lora_dropout {values.lora_dropout}: from 0 up to, but not including, 1.")
    optimizers = [name.value for name in OptimizerNames]
    if values.optim not in optimizers:
        near = difflib.get_close_matches(values.optim, optimizers, n=3)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise UserError(f"--optim {values.optim}: transformers has no such optimizer{hint}.")
    if values.remove_unused_columns:
        raise UserError("--remove_unused_columns True would drop the images: leave it out.")
    if values.eval_strategy != "no":
        raise UserError(
            f"--eval_strategy {values.eval_strategy}: a training run has no evaluation data; "
            "`llava eval` takes its checkpoints."
        )
    if values.deepspeed and values.fsdp:
        raise UserError("--deepspeed and --fsdp exclude one another: both cut the model up.")


def _decide_hardware(values: Namespace, given: set[str], say: Callable[[str], None]) -> None:
    """Fill bf16, fp16, tf32, use_cpu and attn_implementation where the user left them open."""
    if values.precision == "auto" and not {"bf16", "fp16"} & given:
        wanted = None
    elif values.precision in ("bf16", "fp16", "fp32"):
        wanted = values.precision
    else:
        wanted = "bf16" if values.bf16 else "fp16" if values.fp16 else "fp32"
    try:
        plan = hardware.plan(
            "cpu" if values.use_cpu else None, dtype=wanted, attention=values.attn_implementation
        )
    except ValueError as error:
        raise UserError(f"{error} (--precision, --bf16, --fp16, --attn_implementation, --use_cpu)") from error
    for reason in plan.reasons:
        say(reason)
    name = str(plan.dtype).removeprefix("torch.")
    on_cpu = plan.device.type == "cpu"
    if name == "float16" and on_cpu:
        raise UserError("--fp16 needs a GPU: on a CPU use --bf16 True, or neither.")
    if values.tf32 and not plan.tf32:
        raise UserError(
            "--tf32 True needs an Ampere GPU or newer: leave it out, or --precision auto decides."
        )
    values.bf16 = name == "bfloat16"
    values.fp16 = name == "float16"
    values.use_cpu = on_cpu
    values.attn_implementation = plan.attention
    if values.precision == "auto" and values.tf32 is None and plan.tf32:
        values.tf32 = True
    if values.gradient_checkpointing and values.gradient_checkpointing_kwargs is None:
        # The other kind loses the gradient where no input of a layer needs one (LoRA on a frozen projector).
        values.gradient_checkpointing_kwargs = {"use_reentrant": False}


def _decide_accumulation(values: Namespace, given: set[str], say: Callable[[str], None]) -> None:
    if values.global_batch_size is None:
        return
    if "gradient_accumulation_steps" in given:
        say("--gradient_accumulation_steps was given, so --global_batch_size is left aside")
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        batch, steps = split_global_batch(values.global_batch_size, values.per_device_train_batch_size, world)
    except ValueError as error:
        raise UserError(f"--global_batch_size {values.global_batch_size}: {error}") from error
    total = batch * steps * world
    exactly = (
        ""
        if total == values.global_batch_size
        else f", the nearest to the {values.global_batch_size} asked for"
    )
    say(f"global batch {total}{exactly}: {batch} per device x {steps} accumulation steps x {world} processes")
    values.per_device_train_batch_size, values.gradient_accumulation_steps = batch, steps


def split_global_batch(total: int, per_device: int, world: int) -> tuple[int, int]:
    """(batch per device, accumulation steps) so that batch * steps * world == total, batch <= per_device as
    large as possible.

    Where `world` does not divide `total` there are none; then the batch per device stays and the accumulation
    is the one that comes nearest (at least 1).

    >>> split_global_batch(160, 16, 4), split_global_batch(160, 20, 4), split_global_batch(160, 16, 3)
    ((10, 4), (20, 2), (16, 3))
    """
    if total < world:
        raise ValueError(f"{world} processes need at least one sample each.")
    if total % world:
        return per_device, max(1, round(total / (per_device * world)))
    share = total // world
    batch = max(size for size in range(1, min(per_device, share) + 1) if share % size == 0)
    return batch, share // batch


def _decide_reporting(values: Namespace, say: Callable[[str], None]) -> None:
    """Drop trackers that are not installed: the JSONL log is always written, the others are extras."""
    from transformers.integrations import get_available_reporting_integrations

    asked = values.report_to if isinstance(values.report_to, list) else [values.report_to]
    asked = [name for name in asked if name not in (None, "none")]
    if asked in ([], ["all"]):
        return
    there = get_available_reporting_integrations()
    for name in asked:
        if name not in there:
            say(f"--report_to {name}: not installed, so left out (log.jsonl is written in any case)")
    values.report_to = [name for name in asked if name in there] or "none"


# --- Cross-checks


def check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        UserError: naming the flags that contradict one another, or the file that is not there.
    """
    _check_files(model, data, training)
    if model.mm_projector_type is not None:
        build_projector(model.mm_projector_type, 1, 1)  # refuses a name it does not know
    _check_stage(model, training)
    _check_bits(model, training)
    if model.version == "plain" and not data.image_folder:
        raise UserError(
            "--version plain is for image and caption pairs: --image_folder says where the images are."
        )
    if model.mm_token_reducer is not None:
        try:
            model.mm_token_reducer = build_reducer(model.mm_token_reducer).spec
        except ValueError as error:
            raise UserError(f"--mm_token_reducer: {error}") from error


def _check_files(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    if not data.data_path:
        raise UserError("--data_path is missing: a JSON, JSONL or parquet file of conversations.")
    if not Path(data.data_path).exists():
        raise UserError(f"--data_path {data.data_path}: there is no such file.")
    if Path(data.data_path).is_dir():
        raise UserError(
            f"--data_path {data.data_path} is a folder: one JSON, JSONL or parquet file is needed."
        )
    if data.image_folder and not Path(data.image_folder).is_dir():
        raise UserError(f"--image_folder {data.image_folder}: there is no such folder.")
    if model.pretrain_mm_mlp_adapter and not Path(model.pretrain_mm_mlp_adapter).is_file():
        raise UserError(
            f"--pretrain_mm_mlp_adapter {model.pretrain_mm_mlp_adapter}: there is no such file; "
            "the pre-training stage writes it (scripts/v1_5/pretrain.sh)."
        )
    asked = training.resume_from_checkpoint
    if asked not in (None, "True", "true") and not Path(asked).is_dir():
        raise UserError(f"--resume_from_checkpoint {asked}: there is no such folder.")
    _check_writable(Path(training.output_dir))


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder} cannot be written to: choose another folder.")


def _check_stage(model: ModelArguments, training: TrainingArguments) -> None:
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        raise UserError(
            "--tune_mm_mlp_adapter trains only the projector, --freeze_mm_mlp_adapter freezes it: give one."
        )
    if model.tune_mm_mlp_adapter and training.lora_enable:
        raise UserError("--tune_mm_mlp_adapter trains only the projector: leave out --lora_enable.")
    if model.tune_mm_mlp_adapter and model.mm_use_im_start_end:
        raise UserError(
            "--tune_mm_mlp_adapter with --mm_use_im_start_end is not supported (nor is it in LLaVA): "
            "the new tokens' rows would have to train alone in a frozen embedding."
        )
    if training.freeze_mm_mlp_adapter and training.mm_projector_lr is not None:
        raise UserError("--mm_projector_lr needs a projector that trains: leave out --freeze_mm_mlp_adapter.")
    if model.freeze_backbone and training.lora_enable:
        raise UserError(
            "--freeze_backbone and --lora_enable exclude one another: LoRA freezes the model itself."
        )


def _check_bits(model: ModelArguments, training: TrainingArguments) -> None:
    if training.bits not in (4, 8, 16):
        raise UserError(f"--bits {training.bits}: 4, 8 or 16.")
    if training.bits == 16:
        return
    if not (training.lora_enable or model.tune_mm_mlp_adapter):
        raise UserError(f"--bits {training.bits} freezes the language model: add --lora_enable True.")
    if (training.deepspeed and training.hf_deepspeed_config.is_zero3()) or training.fsdp:
        raise UserError(
            f"--bits {training.bits}: ZeRO-3 and FSDP cannot cut up quantized weights over the GPUs; "
            "use --deepspeed scripts/zero2.json, or none."
        )
    if training.bits == 8 and not hardware.supports_llm_int8("cpu" if training.use_cpu else None):
        raise UserError(
            "--bits 8 (LLM.int8) needs a GPU of compute capability 7.5 (a V100 has 7.0): use --bits 4."
        )
