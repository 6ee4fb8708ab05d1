"""Models of a given shape with random weights: enough to measure time, without a checkpoint.

How long a dense network takes does not depend on the values of its weights. What a reducer keeps does, so
give it a fixed budget when timing these.
"""

import dataclasses
import os

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
)

from llava import hardware
from llava.analysis.roofline import HALF, weight_bytes
from llava.analysis.shapes import LanguageShape, Shape, TowerShape
from llava.errors import UserError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.vision_tower import VisionTower


def build_model(shape: Shape, plan: hardware.Plan) -> LlavaLlamaForCausalLM:
    """A LLaVA of this shape, in the plan's dtype, on its device, ready to answer nonsense.

    Raises:
        UserError: it does not fit into the device's memory.
    """
    language, memory = shape.language, memory_of(plan.device)
    needed = weight_bytes(shape) / HALF * plan.dtype.itemsize
    if needed > 0.9 * memory:
        raise UserError(
            f"{shape.name} with {language.layers} layers in {plan.dtype} needs {needed / 1e9:.1f} GB of "
            f"{memory / 1e9:.1f} GB: use --layers N or a smaller --shape."
        )
    config = LlavaConfig(
        hidden_size=language.hidden,
        intermediate_size=language.intermediate,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.kv_heads,
        vocab_size=language.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=language.tied_head,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=shape.tower.hidden,
        image_aspect_ratio="pad",
    )
    with torch.device(plan.device):
        model = AutoModelForCausalLM.from_config(config, dtype=plan.dtype, attn_implementation=plan.attention)
        model.set_vision_tower(build_tower(shape.tower, plan))
    return model.eval().requires_grad_(False)


def memory_of(device: torch.device) -> int:
    """Bytes: what is free on a GPU, all there is on other machines."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def build_tower(shape: TowerShape, plan: hardware.Plan) -> VisionTower:
    """A CLIP or DINOv2 tower with its processor."""
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "patch_size": shape.patch,
    }
    if shape.family == "clip":
        config = CLIPVisionConfig(**sizes, intermediate_size=shape.intermediate, image_size=shape.image)
    else:
        # As released: a table of 37 x 37 positions, interpolated in every call.
        config = Dinov2Config(**sizes, image_size=518)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    )
    model = AutoModel.from_config(config, dtype=plan.dtype, attn_implementation="sdpa")
    return VisionTower(model, image_processor=processor).to(plan.device)


def with_layers(shape: Shape, layers: int | None) -> Shape:
    """The shape with fewer decoder layers: what fits into a small machine, at a layer's real size."""
    if layers is None:
        return shape
    if not 1 <= layers <= shape.language.layers:
        raise UserError(f"--layers must lie between 1 and {shape.language.layers}, not {layers}.")
    return dataclasses.replace(shape, language=dataclasses.replace(shape.language, layers=layers))


def language_shape(config: LlavaConfig) -> LanguageShape:
    """The decoder's shape as a config tells it."""
    return LanguageShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        tied_head=config.tie_word_embeddings,
    )
