"""`llava tools convert --to llava-hf|llava`: between LLaVA's own format and transformers'.

The two hold the same weights under other names. llava-hf keeps the tower inside and has rows for `<image>`,
`<pad>` and filling behind the vocabulary; LLaVA's format names the tower and has no such rows. There and back
is the same model, bit for bit.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlavaProcessor

from llava.errors import UserError
from llava.model.builder import tower_of
from llava.model.checkpoints import (
    EMBEDDINGS,
    TOWER,
    config_for_disk,
    llava_hf_name,
    read_model_weights,
    replacing,
    save_full,
    write_json,
    write_weights,
)
from llava.model.llava_llama import LlavaConfig
from llava.model.tokenization import save_tokenizer
from llava.model.vision_tower import VisionTower
from llava.tools.whole import add_dtype, inspect_llava, load_whole, tower_name_from

logger = logging.getLogger(__name__)

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROWS_OF = 64
"""llava-hf fills its embeddings up to a multiple of this."""

TOWER_FOLDER = "vision_tower"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=("llava-hf", "llava"), help="format to write")
    parser.add_argument("--model-path", required=True, help="any LLaVA checkpoint; LoRA weights are merged")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument(
        "--vision-tower",
        help="--to llava-hf: the tower, if the one the checkpoint names is not here; --to llava: the name to "
        "record for llava-hf's tower (openai/clip-vit-large-patch14-336), which is else written as well",
    )
    parser.add_argument("--out", "--output", required=True, type=Path, help="directory to write")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    info = inspect_llava(args.model_path, args.model_base)
    if not info.is_llava:
        raise UserError(f"{info.path} cannot see: there is no projector to convert")
    weights = read_model_weights(info)
    tokenizer, model = load_whole(info, args.dtype, weights)
    if args.to == "llava-hf":
        tower = tower_of(info, model.config, weights, args.vision_tower, dtype=model.dtype)
        write_llava_hf(model, tokenizer, tower, args.out)
    else:
        name, tower = args.vision_tower, None
        if name is None and info.llava_config.kind == "llava_hf":
            tower = tower_of(info, model.config, weights, dtype=model.dtype)
            # With the directory's own name in front another folder called like that is not taken for it.
            name = f"{args.out.absolute().name}/{TOWER_FOLDER}"
        elif name is None:
            name = tower_name_from(model.config.mm_vision_tower, info.llava_config.path, args.out)
        model.config.mm_vision_tower = name
        if tower is not None:
            write_tower(tower, args.out / TOWER_FOLDER)
        save_full(model, tokenizer, args.out)
    print(args.out)
    return 0


def write_tower(tower: VisionTower, out: Path) -> None:
    """A tower as a directory of its own: config.json, preprocessor_config.json, model.safetensors."""
    with replacing(out) as directory:
        level = f"{tower.encoder.disk_name}." if tower.encoder.disk_name else ""
        weights = {level + name: tensor for name, tensor in tower.backbone.state_dict().items()}
        write_weights(weights, directory)
        tower.image_processor.save_pretrained(directory)
        write_json(directory / "config.json", config_for_disk(tower.config))


def write_llava_hf(model, tokenizer, tower: VisionTower, out: Path) -> None:
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
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} embeddings"
        )
    if config.mm_token_reducer != "none":
        logger.warning(
            "the reducer %s is recorded, but transformers will use every visual token",
            config.mm_token_reducer,
        )
    rows = -(-(config.vocab_size + 2) // ROWS_OF) * ROWS_OF
    tensors = dict(model.state_dict())
    tensors.setdefault("lm_head.weight", model.get_output_embeddings().weight)
    for name in EMBEDDINGS:
        tensors[name] = _with_rows(tensors[name], rows)
    tensors |= {TOWER + name: tensor for name, tensor in tower.backbone.state_dict().items()}

    # The ids behind the model's own, also where its vocabulary is larger than its tokenizer.
    fillers = [f"<unused_{index}>" for index in range(config.vocab_size - len(tokenizer))]
    tokenizer.add_tokens([*fillers, IMAGE_TOKEN, PAD_TOKEN], special_tokens=True)
    tokenizer.pad_token = PAD_TOKEN
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    if ids != [config.vocab_size, config.vocab_size + 1]:
        raise UserError(f"the tokenizer knows {IMAGE_TOKEN} or {PAD_TOKEN} already (ids {ids})")

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


def hf_config(config: LlavaConfig, tower: VisionTower, rows: int, strategy: str) -> dict[str, Any]:
    """config.json of the llava-hf format; what it has no field for is added under LLaVA's name."""
    own = config_for_disk(config)
    text = {name: value for name, value in own.items() if name in LlamaConfig().to_dict()}
    for name in ("architectures", "_name_or_path", "transformers_version"):
        text.pop(name, None)
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
        "text_config": {**text, "model_type": "llama", "vocab_size": rows, "tie_word_embeddings": False},
        "vision_config": config_for_disk(tower.config),
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_token_reducer": config.mm_token_reducer,
    }


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """The table, filled up with the mean of its rows."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])
