"""The format of transformers' own LLaVA classes (llava-hf): its config and its tower, in both directions.

The two formats hold the same weights under other names. llava-hf keeps the tower inside and has rows for
`<image>`, `<pad>` and filling behind the vocabulary; LLaVA's format names the tower and has no such rows.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor

from llava.errors import UserError
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.checkpoints.names import EMBEDDINGS, TOWER, llava_hf_name
from llava.model.checkpoints.write import (
    config_for_disk,
    replacing,
    save_tokenizer,
    write_json,
    write_weights,
)
from llava.model.llava_arch import (
    LANGUAGE_MODELS,
    LlavaMetaConfig,
    LlavaMetaForCausalLM,
    language_model_of,
)
from llava.model.vision_tower import VisionTower

logger = logging.getLogger(__name__)

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROWS_OF = 64
"""llava-hf fills its embeddings up to a multiple of this."""


def hf_vocabulary(config: Mapping[str, Any]) -> int:
    """Rows of llava-hf embeddings that are the language model's own: `<image>` is the first one added."""
    image = config.get("image_token_index", config.get("image_token_id"))
    return int(image if image is not None else 32000)


def llava_config_dict(info: CheckpointInfo) -> dict[str, Any]:
    """The config of the model a checkpoint loads into, in LLaVA's own terms.

    For llava-hf the fields are translated; its tower lies in the checkpoint itself, and the pictures are
    padded to squares, as LLaVA-1.5 was trained (llava-hf's config does not say so, unless we wrote it), or
    cut into tiles where the format is LLaVA-1.6's.

    Raises:
        UserError: a language model or an activation that we have no class for.
    """
    owner = info.llava_config
    if owner.kind != "llava_hf":
        return dict(owner.config)
    config, file = owner.config, owner.path / "config.json"
    text, vision = dict(config["text_config"]), config["vision_config"]
    model_class = language_model_of({"model_type": "llama", **text}, file)
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(f"{file}: its projector uses {config['projector_hidden_act']!r}, only gelu is known")
    strategy = config.get("vision_feature_select_strategy", "default")
    # What the text config leaves out has the text model's defaults.
    text = model_class.text_config_class(**{k: v for k, v in text.items() if k != "model_type"}).to_dict()
    for dropped in ("architectures", "_name_or_path", "transformers_version", "model_type"):
        text.pop(dropped, None)
    tiles: dict[str, Any] = {}
    if config["model_type"] == "llava_next":
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        tiles = {
            "mm_patch_merge_type": "spatial_unpad",
            # (height, width) in transformers, (width, height) in LLaVA
            "image_grid_pinpoints": [
                [width, height] for height, width in config.get("image_grid_pinpoints") or pinpoints
            ],
        }
    return {
        **text,
        "model_type": model_class.config_class.model_type,
        "architectures": [model_class.__name__],
        "vocab_size": hf_vocabulary(config),
        "tie_word_embeddings": config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False),
        # LLaMA's and Mistral's <unk>, with which LLaVA pads
        "pad_token_id": 0 if text.get("bos_token_id") == 1 else None,
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "image_aspect_ratio": config.get("image_aspect_ratio", "anyres" if tiles else "pad"),
        "mm_vision_tower": str(owner.path),
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if strategy == "full" else "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.get("hidden_size", 768),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **tiles,
        **({"mm_token_reducer": config["mm_token_reducer"]} if "mm_token_reducer" in config else {}),
    }


def write_tower(tower: VisionTower, out: Path) -> None:
    """A tower as a directory of its own: config.json, preprocessor_config.json, model.safetensors."""
    with replacing(out) as directory:
        level = f"{tower.encoder.disk_name}." if tower.encoder.disk_name else ""
        weights = {level + name: tensor for name, tensor in tower.backbone.state_dict().items()}
        write_weights(weights, directory)
        tower.image_processor.save_pretrained(directory)
        write_json(directory / "config.json", config_for_disk(tower.config))


def write_llava_hf(model: LlavaMetaForCausalLM, tokenizer, tower: VisionTower, out: Path) -> None:
    """A directory that transformers' LlavaForConditionalGeneration and LlavaProcessor read.

    Raises:
        UserError: a tower, projector or merge type that the format has no place for.
    """
    config = model.config
    if tower.config.model_type != "clip_vision_model":
        raise UserError(f"llava-hf is for CLIP towers, this one is {tower.config.model_type}")
    if config.mm_projector_type != "mlp2x_gelu" or "unpad" in config.mm_patch_merge_type:
        raise UserError(
            "llava-hf (LLaVA-1.5) is for mlp2x_gelu projectors and mm_patch_merge_type flat; this model has "
            f"{config.mm_projector_type} and {config.mm_patch_merge_type}"
        )
    if config.mm_token_reducer != "none":
        logger.warning(
            "the reducer %s is recorded, but transformers uses every visual token unless llava.plug is used",
            config.mm_token_reducer,
        )
    rows = -(-(config.vocab_size + 2) // ROWS_OF) * ROWS_OF
    tensors = dict(model.state_dict())
    tensors.setdefault("lm_head.weight", model.get_output_embeddings().weight)
    for name in EMBEDDINGS:
        tensors[name] = with_rows(tensors[name], rows)
    tensors |= {TOWER + name: tensor for name, tensor in tower.backbone.state_dict().items()}

    # The ids behind the model's own, also where its vocabulary is larger than its tokenizer.
    fillers = [f"<unused_{index}>" for index in range(config.vocab_size - len(tokenizer))]
    tokenizer.add_tokens([*fillers, IMAGE_TOKEN, PAD_TOKEN], special_tokens=True)
    tokenizer.pad_token = PAD_TOKEN
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    if ids != [config.vocab_size, config.vocab_size + 1]:
        raise UserError(
            f"{IMAGE_TOKEN} and {PAD_TOKEN} have the ids {ids}, not those behind the model's "
            f"{config.vocab_size} embeddings: use the tokenizer the model was trained with"
        )

    with replacing(out) as directory:
        write_weights({llava_hf_name(name): tensor for name, tensor in tensors.items()}, directory)
        strategy = "full" if config.mm_vision_select_feature == "cls_patch" else "default"
        LlavaProcessor(
            image_processor=tower.image_processor,
            tokenizer=tokenizer,
            patch_size=tower.config.patch_size,
            vision_feature_select_strategy=strategy,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=1,
        ).save_pretrained(directory)
        save_tokenizer(tokenizer, directory)
        tower.image_processor.save_pretrained(directory)
        model.generation_config.pad_token_id = ids[1]
        model.generation_config.save_pretrained(directory)
        write_json(directory / "config.json", hf_config(config, tower, rows, strategy))


def hf_config(config: LlavaMetaConfig, tower: VisionTower, rows: int, strategy: str) -> dict[str, Any]:
    """config.json of the llava-hf format; what it has no field for is added under LLaVA's name."""
    own = config_for_disk(config)
    text_config_class = LANGUAGE_MODELS[config.model_type].text_config_class
    text = {name: value for name, value in own.items() if name in text_config_class().to_dict()}
    for name in ("architectures", "_name_or_path", "transformers_version"):
        text.pop(name, None)
    text |= {"model_type": text_config_class.model_type, "vocab_size": rows, "tie_word_embeddings": False}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": config.vocab_size,
        "image_seq_length": tower.num_patches + (strategy == "full"),
        "pad_token_id": config.vocab_size + 1,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": False,
        "dtype": own.get("dtype"),
        "torch_dtype": own.get("dtype"),
        "text_config": text,
        "vision_config": config_for_disk(tower.config),
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_token_reducer": config.mm_token_reducer,
    }


def with_rows(table: Tensor, rows: int) -> Tensor:
    """[rows, D] the table, filled up with the mean of its rows, as LLaVA starts those of tokens it adds."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])
