"""From a directory on disk to a model that answers: `load_pretrained_model`.

What to do is decided by what the checkpoint holds (`llava.model.checkpoints`) and by the device
(`llava.hardware`), not by how things are called. Weights go once from the file to their device.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llava import hardware
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import UserError, first_line
from llava.model.checkpoints import (
    KINDS,
    MAX_ADDED_TOKENS,
    TOWER,
    CheckpointInfo,
    Weights,
    check_weights,
    fit_vocabulary,
    hf_vocabulary,
    inspect_checkpoint,
    llava_config_dict,
    read_adapter,
    read_json,
    read_model_weights,
    resolve_directory,
)
from llava.model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.packed import can_pack, pack
from llava.model.tokenization import load_tokenizer
from llava.model.vision_tower import VisionTower, load_vision_tower
from llava.reducers import ReducerSpecError, build_reducer

if TYPE_CHECKING:
    from peft import PeftModel  # imported where it is needed: it takes seconds

__all__ = ["load_pretrained_model", "load_tokenizer"]

logger = logging.getLogger(__name__)

AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate works out."""

KEEP_PRECISION = ["lm_head", "model.mm_projector", "model.vision_tower"]
"""What stays out of 4- and 8-bit; bitsandbytes matches whole names from the start."""

SMALL = 2**30
"""Bytes of weights that load before a progress bar is of use."""

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
    packed: bool = False,
    customized_config: str | Path | Mapping[str, Any] | LlavaConfig | None = None,
    use_flash_attention_2: bool = False,
    multimodal: bool | None = None,
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
        packed: on a CPU in float32, keep a second copy of the weights laid out for short prompts
            (`llava.model.packed`): faster, for twice the memory.
        customized_config: config.json (its path or content) instead of the checkpoint's.
        multimodal: accepted, because evaluation harnesses pass it.

    Returns:
        (tokenizer, model, image_processor, context_len); the processor is None for a model without vision.

    Raises:
        UserError: one sentence about what is wrong with the checkpoint, the flags or the device.
    """
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit exclude each other: choose one")
    if reducer is not None:
        _check_reducer(reducer)  # before minutes of loading
    info = inspect_checkpoint(model_path, model_base)
    if info.kind == "vision_tower":
        raise UserError(
            f"{info.path} is {KINDS[info.kind]}, not a model that answers: pass it as vision_tower"
        )
    if info.needs_base:
        info.require_base()

    if use_flash_attn or use_flash_attention_2:
        attn_implementation = attn_implementation or "flash_attention_2"
    plan, device_map = _place(device, device_map, dtype or torch_dtype, attn_implementation)
    if packed and not can_pack(plan.device, plan.dtype):
        raise UserError(f"packed weights are for float32 on a CPU, not {plan.dtype} on {plan.device}")
    options = {
        "dtype": plan.dtype,
        "attn_implementation": plan.attention,
        "device_map": device_map,
        "quantization_config": _quantization(load_8bit, load_4bit, plan),
    }
    if not info.is_llava:
        model = load_plain(info.base or info, **options)
        answering = apply_lora(model, info, merge=merge_lora) if info.kind == "lora" else model
        finish(model, info)
        if packed:
            _pack(model)
        return tokenizer_of(info), answering.eval(), None, _context_length(info.config)

    raw = _config_dict(customized_config) if customized_config is not None else llava_config_dict(info)
    if reducer is not None:
        raw["mm_token_reducer"] = reducer
    config = build_config(raw, info)
    tokenizer = tokenizer_of(info, config)
    weights = read_model_weights(info)
    adapted = info.kind == "lora"
    if adapted and merge_lora and options["quantization_config"] is not None:
        weights, adapted = _merged(info, config, weights), False
    model = load_language_model(info, config, weights, num_tokens=len(tokenizer), **options)
    # LoRA first: its target names (q_proj ...) exist in the tower too.
    answering = apply_lora(model, info, merge=merge_lora) if adapted else model
    tower = tower_of(info, config, weights, vision_tower, device=model.device, dtype=plan.dtype)
    model.set_vision_tower(tower)
    if vision_tower is not None:
        model.config.mm_vision_tower = str(vision_tower)
    finish(model, info)
    if packed:
        _pack(model)
    if raw.get("mm_token_reducer") is None:
        logger.warning(
            "%s does not say which tokens to use: all %d visual tokens of an image are; "
            "--reducer prumerge+ (reducer=) keeps fewer",
            info.llava_config.path / "config.json",
            tower.num_patches,
        )
    return tokenizer, answering.eval(), tower.image_processor, _context_length(raw)


def _pack(model: torch.nn.Module) -> None:
    """Packs what can be packed, and says so where that is nothing."""
    if not pack(model):
        logger.warning("packed weights have no effect here: no layer of this model has a packed form")


# Device ------------------------------------------------------------------------------------------


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


def _quantization(load_8bit: bool, load_4bit: bool, plan: hardware.Plan) -> BitsAndBytesConfig | None:
    if not (load_8bit or load_4bit):
        return None
    flag = "8-bit" if load_8bit else "4-bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flag} loading needs bitsandbytes: pip install 'llava[quant]'")
    if load_8bit and not hardware.supports_llm_int8(plan.device):
        raise UserError(
            "8-bit loading (LLM.int8) needs compute capability 7.5, which this GPU lacks: use load_4bit"
        )
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEEP_PRECISION)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=plan.dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=KEEP_PRECISION,
    )


# Parts -------------------------------------------------------------------------------------------


def build_config(raw: Mapping[str, Any], info: CheckpointInfo) -> LlavaConfig:
    """Our config from a config.json of any age.

    Raises:
        UserError: a field that makes no sense, an unknown reducer among them.
    """
    # Released checkpoints say "llava", which is another class of transformers today.
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    if fields.get("mm_token_reducer") is None:
        fields["mm_token_reducer"] = "none"
    try:
        config = LlavaConfig.from_dict(fields)
        build_reducer(config.mm_token_reducer)
        return config
    except ReducerSpecError as error:
        raise UserError(f"{info.llava_config.path / 'config.json'}, mm_token_reducer: {error}") from error
    except Exception as error:  # whatever a field of the wrong type meets first
        raise UserError(
            f"{info.llava_config.path / 'config.json'} makes no sense: {first_line(error)}"
        ) from error


def load_language_model(
    info: CheckpointInfo,
    config: LlavaConfig,
    weights: Weights | None = None,
    *,
    num_tokens: int | None = None,
    **options: Any,
) -> LlavaLlamaForCausalLM:
    """The model without tower and adapters, every weight from the files.

    Args:
        info: what is loaded; a language model without vision will do, then there is no projector.
        config: its config; `vocab_size` is raised where tokens were added.
        weights: `read_model_weights(info)` where it is known already.
        num_tokens: length of the tokenizer; the embeddings get as many rows at least.
        options: for from_pretrained: dtype, device_map, attn_implementation, quantization_config.

    Raises:
        UserError: a weight is missing, of the wrong shape, or unknown.
    """
    found = language_model_weights(info, config, read_model_weights(info) if weights is None else weights)
    if num_tokens is not None and num_tokens > config.vocab_size:
        if num_tokens - config.vocab_size > MAX_ADDED_TOKENS:
            raise UserError(
                f"the tokenizer has {num_tokens} tokens but {info.path} only {config.vocab_size} embeddings: "
                "use the tokenizer the model was trained with"
            )
        found = fit_vocabulary(found, num_tokens)
        config.vocab_size = num_tokens

    size = sum(tensor.nbytes for tensor in found.tensors.values())
    with _quiet(size):
        return LlavaLlamaForCausalLM.from_pretrained(None, config=config, state_dict=found.tensors, **options)


def language_model_weights(info: CheckpointInfo, config: LlavaConfig, weights: Weights) -> Weights:
    """Those of language model and projector, complete and of the right shapes.

    Raises:
        UserError: a weight is missing, of the wrong shape, or unknown.
    """
    found = weights.select(lambda name: not name.startswith(TOWER))
    if config.tie_word_embeddings:
        found = found.select(lambda name: name != "lm_head.weight")
    if info.needs_base:
        found = fit_vocabulary(found, config.vocab_size)
    check_weights(found, _shapes(config), info)
    return found


@contextmanager
def _quiet(size: int) -> Iterator[None]:
    """transformers without its load report, and without a progress bar for a few weights."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if size < SMALL:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _shapes(config: LlavaConfig) -> dict[str, torch.Size]:
    """The weights such a model has, tower aside."""
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def apply_lora(model: PreTrainedModel, info: CheckpointInfo, *, merge: bool) -> "PreTrainedModel | PeftModel":
    """The model with a checkpoint's LoRA weights added (the same object), or in a PeftModel with its adapter.

    Raises:
        UserError: the adapter does not fit the model.
    """
    # bitsandbytes, which peft imports, reports a kernel that is only an optimisation.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    settings_file, base = info.path / "adapter_config.json", _base_path(info)
    adapter = read_adapter(info)
    model.name_or_path = str(base)
    try:
        settings = LoraConfig.from_pretrained(str(info.path))
        settings.inference_mode = True
        settings.base_model_name_or_path = str(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers has renamed
            peft_model = get_peft_model(model, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{settings_file} does not fit {base}: {first_line(error)}") from error
    # False: "auto" would ask the Hub about the base.
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for name in sorted(expected.keys() | adapter.keys()):
        if name not in adapter:
            raise UserError(
                f"{info.adapter} lacks {name}, which {settings_file} asks for: download both again"
            )
        if name not in expected:
            raise UserError(
                f"{info.adapter} holds {name}, but {base} has no such layer: it is the wrong base"
            )
        if adapter[name].shape != expected[name].shape:
            raise UserError(
                f"{info.adapter}: {name} has shape {list(adapter[name].shape)}, but {base} asks for "
                f"{list(expected[name].shape)}: it is probably the wrong base"
            )
    set_peft_model_state_dict(peft_model, adapter)
    if merge:
        return peft_model.merge_and_unload()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:  # peft makes them float32, for training
            parameter.data = parameter.data.to(model.dtype)
    return peft_model


def _merged(info: CheckpointInfo, config: LlavaConfig, weights: Weights) -> Weights:
    """The weights with LoRA added, on the CPU: merging into quantised ones would round them twice."""
    dtype = weights.tensors["model.norm.weight"].dtype
    model = load_language_model(info, config, weights, dtype=dtype, device_map={"": "cpu"})
    merged = apply_lora(model, info, merge=True).state_dict()
    return Weights(
        {name: merged.get(name, tensor) for name, tensor in weights.tensors.items()}, dict(weights.source)
    )


def _base_path(info: CheckpointInfo) -> Path:
    return info.base.path if info.base is not None else info.path


def tower_of(
    info: CheckpointInfo,
    config: LlavaConfig,
    weights: Weights,
    override: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VisionTower:
    """The tower from its own path; from the checkpoint only where that carries one of its own.

    Args:
        weights: `read_model_weights(info)`.
        override: another tower than the config's.

    Raises:
        UserError: no tower is named, it cannot be found, or its files are damaged.
    """
    name = override or config.mm_vision_tower
    if not name:
        raise UserError(f"{info.path / 'config.json'} names no vision tower: pass --vision-tower PATH")
    owner = info.llava_config
    path = resolve_directory(
        name, beside=None if override else owner.path, remedy="--vision-tower PATH (vision_tower=)"
    )
    own = None
    if override is None and (owner.kind == "llava_hf" or config.unfreeze_mm_vision_tower):
        carried = weights.select(lambda key: key.startswith(TOWER)).tensors
        own = {key.removeprefix(TOWER): tensor for key, tensor in carried.items()} or None
    with _quiet(0):
        return load_vision_tower(
            path,
            select_layer=config.mm_vision_select_layer,
            select_feature=config.mm_vision_select_feature,
            dtype=dtype,
            device=device,
            state_dict=own,
        )


def tokenizer_of(info: CheckpointInfo, config: LlavaConfig | None = None):
    """The checkpoint's own tokenizer, else its base's, with the tokens that the config says were added.

    llava-hf's comes without `<image>` and `<pad>`, for which LLaVA has no embeddings.
    """
    owner = next((one for one in (info, info.base) if one is not None and one.has_tokenizer), info)
    tokenizer = load_tokenizer(owner.path)
    if owner.kind == "llava_hf":
        rows = hf_vocabulary(owner.config)
        kept = {index: token for index, token in tokenizer.added_tokens_decoder.items() if index < rows}
        tokenizer = load_tokenizer(owner.path, added_tokens_decoder=kept, pad_token="<unk>")
    if config is not None and config.mm_use_im_patch_token:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if config is not None and config.mm_use_im_start_end:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return tokenizer


def load_plain(info: CheckpointInfo, **options: Any) -> PreTrainedModel:
    """A language model without vision, by transformers.

    Raises:
        UserError: transformers cannot load it.
    """
    size = sum(file.stat().st_size for file in info.files if file.is_file())
    try:
        with _quiet(size):
            return AutoModelForCausalLM.from_pretrained(info.path, local_files_only=True, **options)
    except Exception as error:  # torch, safetensors, pickle and transformers each have their own
        raise UserError(f"cannot load {info.path}: {first_line(error)}") from error


def finish(model: PreTrainedModel, info: CheckpointInfo) -> None:
    """Frozen, in eval mode, with the generation settings of the files."""
    model.requires_grad_(False)
    model.eval()
    model.name_or_path = model.config.name_or_path = str(info.path)
    for owner in (info, info.base):
        if owner is not None and (owner.path / "generation_config.json").is_file():
            model.generation_config = generation_config(read_json(owner.path / "generation_config.json"))
            break
    else:
        model.generation_config = generation_config(model.generation_config.to_dict())


def generation_config(content: Mapping[str, Any]) -> GenerationConfig:
    """Generation settings without what old files get wrong.

    Vicuna's has a temperature but no do_sample, about which every greedy run would be warned; LLaVA's has the
    context as max_length, about which every run with max_new_tokens would be.
    """
    kept = {name: value for name, value in content.items() if not name.startswith(("_", "transformers_"))}
    if not kept.get("do_sample"):
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            kept.pop(name, None)
    if (limit := kept.pop("max_length", None)) is not None:
        kept.setdefault("max_new_tokens", limit)
    return GenerationConfig.from_dict(kept)


def _context_length(raw: Mapping[str, Any]) -> int:
    return raw.get("max_sequence_length") or DEFAULT_CONTEXT


def _config_dict(given: str | Path | Mapping[str, Any] | LlavaConfig) -> dict[str, Any]:
    if isinstance(given, LlavaConfig):
        return given.to_dict()
    if isinstance(given, Mapping):
        return dict(given)
    path = Path(given)
    return read_json(path / "config.json" if path.is_dir() else path)


def _check_reducer(spec: str) -> None:
    try:
        build_reducer(spec)
    except ReducerSpecError as error:
        raise UserError(str(error)) from error
