"""Models of a given shape with random weights: enough to measure time, without a checkpoint.

How long a dense network takes does not depend on the values of its weights. What a reducer keeps does, so
give it a fixed budget when timing these.
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
)

from llava import hardware
from llava.analysis.roofline import HALF, weight_bytes
from llava.analysis.shapes import Shape, TowerShape
from llava.errors import UserError
from llava.model.language_model import language_model_of
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.vision_tower import VisionTower


def build_model(shape: Shape, plan: hardware.Plan) -> LlavaMetaForCausalLM:
    """A LLaVA of this shape, in the plan's dtype, on its device, ready to answer nonsense.

    Raises:
        UserError: it does not fit into the device's memory.
    """
    memory = memory_of(plan.device)
    needed = weight_bytes(shape) / HALF * plan.dtype.itemsize
    if needed > 0.9 * memory:
        raise UserError(
            f"{shape.language.num_hidden_layers} layers of this --shape in {plan.dtype} need "
            f"{needed / 1e9:.1f} GB of {memory / 1e9:.1f} GB: use --layers N or a smaller --shape."
        )
    fields = {name: value for name, value in asdict(shape.language).items() if value is not None}
    model_class = language_model_of(fields, Path("shapes.py"))
    del fields["model_type"]  # the language model's own, not that of LLaVA on it
    fields["max_position_embeddings"] = 8192
    config = model_class.config_class(
        **fields,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=shape.tower.hidden_size,
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
    sizes = asdict(shape)
    config: PreTrainedConfig
    if sizes.pop("family") == "clip":
        config = CLIPVisionConfig(**sizes)
    else:  # as released: a table of 37 x 37 positions, interpolated in every call
        config = Dinov2Config(**sizes | {"image_size": 518})
    side = shape.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    model = AutoModel.from_config(config, dtype=plan.dtype, attn_implementation="sdpa")
    return VisionTower(model, image_processor=processor).to(plan.device)
