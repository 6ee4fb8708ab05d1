"""Made-up values of what a reducer may read beside patches, query and key."""

import torch
from torch import Tensor


def optional_fields(batch: int, length: int, width: int, dtype: torch.dtype) -> dict:
    """Every optional field of VisionFeatures; image i's question has i + 1 segments and 2 i + 3 words."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fields = {
        "cls": draw(batch, 1, width),
        "cls_attn": draw(batch, 4, length + 1).softmax(2)[..., 1:],
        "block_key": draw(batch, length + 1, width),
        "projected": draw(batch, length, 24),
        "attn_mid": draw(batch, length + 1).softmax(1),
        "attn_deep": draw(batch, length + 1).softmax(1),
        "image_embeds": draw(batch, length, 12),
    }
    texts = {
        "text_embeds": [draw(i + 1, 12).to(dtype) for i in range(batch)],
        "text_tokens": [draw(2 * i + 3, 24).to(dtype) for i in range(batch)],
    }
    return {name: value.to(dtype) for name, value in fields.items()} | texts
