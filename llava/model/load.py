"""The one loader: from the files of a checkpoint to a model, for inference (`builder`) and for training.

The parts are loaded in this order: config, tokenizer, language model and projector with every weight checked
(quantised on the way where that is asked for), LoRA adapters, vision tower, generation settings.
"""

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import UserError, first_line
from llava.model.checkpoints import (
    MAX_ADDED_TOKENS,
    TOWER,
    CheckpointInfo,
    Weights,
    check_weights,
    fit_vocabulary,
    hf_vocabulary,
    read_adapter,
    read_json,
    read_model_weights,
    resolve_directory,
)
from llava.model.llava_arch import LANGUAGE_MODELS, LlavaMetaConfig, LlavaMetaForCausalLM, language_model_of
from llava.model.tokenization import load_language_model_tokenizer, load_tokenizer
from llava.model.vision_tower import VisionTower, load_vision_tower, quiet_loading
from llava.reducers import ReducerSpecError, build_reducer

if TYPE_CHECKING:
    from peft import PeftModel  # imported where it is needed: it takes seconds

logger = logging.getLogger(__name__)

KEEP_PRECISION = ["lm_head", "model.mm_projector", "model.vision_tower"]
"""What stays out of 4- and 8-bit. Full names: a suffix does not match numbered layers."""


def build_config(raw: Mapping[str, Any], info: CheckpointInfo) -> LlavaMetaConfig:
    """Our config from a config.json of any age.

    Raises:
        UserError: a language model we have no class for, a field of the wrong type, an unknown reducer.
    """
    file = info.llava_config.path / "config.json"
    model_class = language_model_of(raw, file)
    # Released checkpoints say "llava", which is another class of transformers today.
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    if fields.get("mm_token_reducer") is None:
        fields["mm_token_reducer"] = "none"
    try:
        config = model_class.config_class.from_dict(fields)
    except Exception as error:  # transformers' own code, which meets a field of the wrong type anywhere
        raise UserError(f"{file} is not a valid config: {first_line(error)}") from error
    try:
        build_reducer(config.mm_token_reducer, allow_files=False)
    except ReducerSpecError as error:
        raise UserError(f"{file}, mm_token_reducer: {error}") from error
    return config


def quantization(
    bits: int, compute_dtype: torch.dtype, *, double_quant: bool = True, quant_type: str = "nf4"
) -> BitsAndBytesConfig:
    """4 or 8 bits for the language model's layers.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{bits}-bit loading needs bitsandbytes: pip install 'llava[quant]'")
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=KEEP_PRECISION,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )


def tokenizer_of(
    info: CheckpointInfo, config: LlavaMetaConfig | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    """The checkpoint's own tokenizer, else its base's, with the tokens that the config says were added."""
    owner = next((one for one in (info, info.base) if one is not None and one.has_tokenizer), info)
    if owner.kind == "llava_hf":
        tokenizer = load_language_model_tokenizer(owner.path, hf_vocabulary(owner.config), **options)
    else:
        tokenizer = load_tokenizer(owner.path, **options)
    if config is not None and config.mm_use_im_patch_token:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if config is not None and config.mm_use_im_start_end:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return tokenizer


def load_language_model(
    info: CheckpointInfo,
    config: LlavaMetaConfig,
    weights: Weights | None = None,
    *,
    num_tokens: int | None = None,
    **options: Any,
) -> LlavaMetaForCausalLM:
    """Language model and projector, every weight from the files; without tower and adapters.

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
    name = config.name_or_path  # from_pretrained(None) writes "None" there
    with quiet_loading(size):
        model = LANGUAGE_MODELS[config.model_type].from_pretrained(
            None, config=config, state_dict=found.tensors, **options
        )
    model.name_or_path = model.config.name_or_path = name
    model.generation_config = generation_config(info, model)
    return model


def language_model_weights(info: CheckpointInfo, config: LlavaMetaConfig, weights: Weights) -> Weights:
    """Those of language model and projector, complete and of the right shapes.

    Raises:
        UserError: a weight is missing, of the wrong shape, or unknown.
    """
    found = weights.select(lambda name: not name.startswith(TOWER))
    with torch.device("meta"):
        model = LANGUAGE_MODELS[config.model_type](config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        found = found.select(lambda name: name != "lm_head.weight")
        shapes.pop("lm_head.weight", None)
    if info.kind == "plain_lm":  # what LLaVA adds is drawn anew
        shapes.pop("model.image_newline", None)
    if info.needs_base:
        found = fit_vocabulary(found, config.vocab_size)
    check_weights(found, shapes, info)
    return found


def apply_lora(model: PreTrainedModel, info: CheckpointInfo, *, merge: bool) -> "PreTrainedModel | PeftModel":
    """The model with a checkpoint's LoRA weights added (the same object), or in a PeftModel with its adapter.

    Raises:
        UserError: the adapter does not fit the model.
    """
    # bitsandbytes, which peft imports, reports a kernel that is only an optimisation.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    settings_file, base = info.path / "adapter_config.json", (info.base or info).path
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
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    given = {name: list(tensor.shape) for name, tensor in adapter.items()}
    for name in sorted(shapes.keys() | given.keys()):
        if shapes.get(name) != given.get(name):
            raise UserError(
                f"{info.adapter}: {name} has shape {given.get(name, 'none, it is missing')}, but on {base} "
                f"{settings_file.name} asks for {shapes.get(name, 'none')}: a file is damaged, or it is the "
                "wrong base"
            )
    set_peft_model_state_dict(peft_model, adapter)
    if merge:
        return peft_model.merge_and_unload()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:  # peft makes them float32, for training
            parameter.data = parameter.data.to(model.dtype)
    return peft_model


def merge_weights(info: CheckpointInfo, config: LlavaMetaConfig, weights: Weights) -> Weights:
    """The weights with LoRA added, on the CPU: merging into quantised ones would round them twice."""
    dtype = weights.tensors["model.norm.weight"].dtype
    model = load_language_model(info, config, weights, dtype=dtype, device_map={"": "cpu"})
    merged = apply_lora(model, info, merge=True).state_dict()
    return Weights(
        {name: merged.get(name, tensor) for name, tensor in weights.tensors.items()}, dict(weights.source)
    )


def tower_of(
    info: CheckpointInfo,
    config: LlavaMetaConfig,
    weights: Weights,
    override: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VisionTower:
    """The tower from its own path; from the checkpoint only where that carries one of its own.

    Args:
        weights: `read_model_weights(info)`.
        override: another tower than the config's. The name that the config records is no other tower.

    Raises:
        UserError: no tower is named, it cannot be found, or its files are damaged.
    """
    owner = info.llava_config
    recorded = owner.config.get("mm_vision_tower") or config.mm_vision_tower
    other = override is not None and str(override) != recorded
    name = override if other else config.mm_vision_tower
    if not name:
        raise UserError(f"{owner.path / 'config.json'} names no vision tower: pass --vision-tower PATH")
    path = resolve_directory(
        name, beside=None if other else owner.path, remedy="--vision-tower PATH (vision_tower=)"
    )
    own = None
    if not other and (owner.kind == "llava_hf" or config.unfreeze_mm_vision_tower):
        carried = weights.select(lambda key: key.startswith(TOWER)).tensors
        own = {key.removeprefix(TOWER): tensor for key, tensor in carried.items()} or None
    return load_vision_tower(
        path,
        select_layer=config.mm_vision_select_layer,
        select_feature=config.mm_vision_select_feature,
        dtype=dtype,
        device=device,
        state_dict=own,
    )


def load_plain(info: CheckpointInfo, **options: Any) -> PreTrainedModel:
    """A language model without vision, by transformers, with its LoRA weights' base if `info` has one.

    Raises:
        UserError: transformers cannot load it.
    """
    owner = info.base or info
    size = sum(file.stat().st_size for file in owner.files if file.is_file())
    try:
        with quiet_loading(size):
            model = AutoModelForCausalLM.from_pretrained(owner.path, local_files_only=True, **options)
    except Exception as error:  # torch, safetensors, pickle and transformers each have their own
        raise UserError(f"cannot load {owner.path}: {first_line(error)}") from error
    model.generation_config = generation_config(info, model)
    return model


def generation_config(info: CheckpointInfo, model: PreTrainedModel) -> GenerationConfig:
    """The generation settings of the files, else the model's, without what old files get wrong.

    Vicuna's has a temperature but no do_sample, about which every greedy run would be warned; LLaVA's has the
    context as max_length, about which every run with max_new_tokens would be.
    """
    owners = (owner for owner in (info, info.base) if owner is not None)
    file = next((f for owner in owners if (f := owner.path / "generation_config.json").is_file()), None)
    content = model.generation_config.to_dict() if file is None else read_json(file)
    kept = {name: value for name, value in content.items() if not name.startswith(("_", "transformers_"))}
    if not kept.get("do_sample"):
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            kept.pop(name, None)
    if (limit := kept.pop("max_length", None)) is not None:
        kept.setdefault("max_new_tokens", limit)
    return GenerationConfig.from_dict(kept)
