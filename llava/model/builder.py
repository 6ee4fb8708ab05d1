"""`load_pretrained_model`, as evaluation harnesses and notebooks call it, onto `llava.model.load`.

What to do is decided by what the checkpoint holds (`llava.model.checkpoints`) and by the device
(`llava.hardware`), not by how things are called. Weights go once from the file to their device.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from llava import hardware
from llava.errors import UserError
from llava.model.anyres import BUDGETS
from llava.model.checkpoints import (
    inspect_model,
    llava_config_dict,
    read_json,
    read_model_weights,
)
from llava.model.load import (
    apply_lora,
    build_config,
    load_language_model,
    load_plain,
    merge_weights,
    quantization,
    tokenizer_of,
    tower_of,
)
from llava.model.tokenization import load_tokenizer
from llava.reducers import ReducerSpecError, build_reducer

__all__ = ["load_pretrained_model", "load_tokenizer"]

logger = logging.getLogger(__name__)

AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate works out."""

DEFAULT_CONTEXT = 2048
"""Tokens of context where a config has no max_sequence_length, which no released one has."""


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | int | torch.device | Mapping[str, Any] | None = "auto",
    device: str | torch.device = "cuda",
    use_flash_attn: bool = False,
    *,
    reducer: str | None = None,
    vision_tower: str | Path | None = None,
    merge_lora: bool = True,
    attn_implementation: str | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    customized_config: str | Path | Mapping[str, Any] | PreTrainedConfig | None = None,
    use_flash_attention_2: bool = False,
    multimodal: bool | None = None,
    anyres: str | None = None,
):
    """A model ready to answer, with its tokenizer and image processor.

    Reads whole LLaVA checkpoints (.bin or safetensors, sharded or not), LoRA and projector-only checkpoints
    on their base, llava-hf, and language models without vision. The model is frozen, in eval mode, in the
    dtype and with the attention kernel that suit the device (`llava.hardware.plan`).

    Args:
        model_path: directory, or `owner/name` on the Hub; a directory wins.
        model_base: the base of a LoRA or projector-only checkpoint.
        model_name: not used: what the directory holds decides. Here because every caller passes it.
        load_8bit, load_4bit: quantise the language model with bitsandbytes (LLM.int8; NF4, double quantised).
        device_map: a device, a map of modules to devices, or "auto" to spread over all GPUs.
        device: "cuda" means the best there is: without a GPU it becomes "cpu", and that is said.
        use_flash_attn, use_flash_attention_2: ask for FlashAttention 2.
        reducer: spec of a token reducer (`llava.reducers`) instead of the one in config.json.
        vision_tower: directory or Hub name of the tower instead of the one in config.json.
        merge_lora: add LoRA weights to the base's; False returns a PeftModel with the adapter in place.
        attn_implementation: "sdpa", "eager", "flash_attention_2" ... instead of the device's best.
        dtype, torch_dtype: "float16", "bfloat16" or "float32" instead of the device's best.
        customized_config: config.json (its path or content) instead of the checkpoint's.
        multimodal: accepted, because evaluation harnesses pass it.
        anyres: "tile", "shared" or "papers" instead of config.json's `mm_anyres_budget`: how many tokens the
            tiles of a LLaVA-1.6 picture keep (`llava.model.anyres`).

    Returns:
        (tokenizer, model, image_processor, context_len); the processor is None for a model without vision.

    Raises:
        UserError: one sentence about what is wrong with the checkpoint, the flags or the device.
    """
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit exclude each other: choose one")
    if reducer is not None:
        try:
            build_reducer(reducer)  # before minutes of loading
        except ReducerSpecError as error:
            raise UserError(str(error)) from error
    info = inspect_model(model_path, model_base)

    if use_flash_attn or use_flash_attention_2:
        attn_implementation = attn_implementation or "flash_attention_2"
    plan, device_map = _place(device, device_map, dtype or torch_dtype, attn_implementation)
    options: dict[str, Any] = {
        "dtype": plan.dtype,
        "attn_implementation": plan.attention,
        "device_map": device_map,
    }
    if load_8bit and not hardware.supports_llm_int8(plan.device):
        raise UserError(
            "8-bit loading (LLM.int8) needs compute capability 7.5, which this GPU lacks: use load_4bit"
        )
    if load_8bit or load_4bit:
        options["quantization_config"] = quantization(8 if load_8bit else 4, plan.dtype)

    adapted = info.kind == "lora"
    model: Any  # a LLaVA, or a language model alone
    if info.is_llava:
        raw = llava_config_dict(info) if customized_config is None else _config_dict(customized_config)
        if anyres is not None:
            if anyres not in BUDGETS or raw.get("image_aspect_ratio") != "anyres":
                raise UserError(
                    f"anyres={anyres!r}: it is one of {', '.join(BUDGETS)}, for checkpoints that cut "
                    f"pictures into tiles (image_aspect_ratio is {raw.get('image_aspect_ratio')!r} here)"
                )
            raw = {**raw, "mm_anyres_budget": anyres}
        config = build_config({**raw, "mm_token_reducer": "none"} if reducer else raw, info)
        tokenizer = tokenizer_of(info, config)
        weights = read_model_weights(info)
        if adapted and merge_lora and "quantization_config" in options:
            weights, adapted = merge_weights(info, config, weights), False
        model = load_language_model(info, config, weights, num_tokens=len(tokenizer), **options)
        if reducer is not None:
            model.set_reducer(reducer)
    else:
        raw, tokenizer = info.config, tokenizer_of(info)
        model = load_plain(info, **options)
    # LoRA before the tower: its target names (q_proj ...) exist there too.
    answering = apply_lora(model, info, merge=merge_lora) if adapted else model
    image_processor = None
    if info.is_llava:
        tower = tower_of(info, config, weights, vision_tower, device=model.device, dtype=plan.dtype)
        model.set_vision_tower(tower)
        image_processor = tower.image_processor
        if vision_tower is not None:
            model.config.mm_vision_tower = str(vision_tower)
        if reducer is None and raw.get("mm_token_reducer") is None:
            logger.warning(
                "%s does not say which tokens to use: all %d visual tokens of an image are; "
                "--reducer prumerge+ (reducer=) keeps fewer",
                info.llava_config.path / "config.json",
                tower.num_patches,
            )
    model.requires_grad_(False)
    model.name_or_path = model.config.name_or_path = str(info.path)
    return tokenizer, answering.eval(), image_processor, raw.get("max_sequence_length") or DEFAULT_CONTEXT


def _place(
    device: str | torch.device,
    device_map: Any,
    dtype: str | torch.dtype | None,
    attention: str | None,
) -> tuple[hardware.Plan, Any]:
    """What the device wants, and the device map for from_pretrained."""
    named = _as_device(device_map)
    wanted = named or _as_device(device) or torch.device("cuda")
    missing = wanted.type == "cuda" and not torch.cuda.is_available()
    # "cuda" without a number leaves the choice to the plan, and so to LLAVA_DEVICE.
    asked = None if missing or wanted == torch.device("cuda") else wanted
    try:
        plan = hardware.plan(asked, dtype=dtype, attention=attention)
        if named is not None and named.type == "cpu" and dtype is None and torch.cuda.is_available():
            # Harnesses load with device_map="cpu" and move the model to the GPU themselves.
            plan = hardware.plan("cpu", dtype=hardware.plan("cuda").dtype, attention=attention)
            logger.warning("loading to the CPU in the GPU's dtype, %s: dtype= changes it", plan.dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    if missing:
        logger.warning("no CUDA device here: using %s, in %s", plan.device, plan.dtype)
    for reason in plan.reasons:
        logger.info("%s", reason)
    if isinstance(device_map, Mapping) and named is None and not missing:
        return plan, dict(device_map)
    if named is None and device_map in AUTOMATIC_MAPS and device == "cuda" and plan.device.type == "cuda":
        return plan, device_map
    return plan, {"": plan.device}


def _as_device(value: Any) -> torch.device | None:
    """The one device that `device` or a device map names, if it does."""
    if isinstance(value, Mapping):
        return _as_device(value[""]) if list(value) == [""] else None
    if value is None or value == "" or value in AUTOMATIC_MAPS:
        return None
    if isinstance(value, int):
        return torch.device("cuda", value)
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{value!r} is no device (cuda, cuda:1, cpu) and no device map ({', '.join(AUTOMATIC_MAPS)})"
        ) from error


def _config_dict(given: str | Path | Mapping[str, Any] | PreTrainedConfig) -> dict[str, Any]:
    """The content of config.json: as given, of a config object, or of a file or directory."""
    if isinstance(given, PreTrainedConfig):
        return given.to_dict()
    if isinstance(given, Mapping):
        return dict(given)
    path = Path(given)
    return read_json(path / "config.json" if path.is_dir() else path)
