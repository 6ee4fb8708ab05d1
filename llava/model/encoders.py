"""The way through a vision transformer that computes what a reducer and the projector read, and no more.

The weights live in transformers' own modules (CLIPVisionModel, Dinov2Model, ...); only the way through them
is ours. Image features are taken before the last block, and a reducer wants just that block's keys and the
query of its CLS row, which are functions of the same features. So with LLaVA's `select_layer=-2` the last
block is never run: one layer norm, one Linear for k, and one row of the Linear for q replace it.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from llava.reducers.features import VisionFeatures


class VisionEncoder:
    """The way through one family of transformers' vision models; subclasses name the family's parts.

    Differentiable. Neither owns nor changes the model: its mode, gradients, devices and hooks stay as they
    are.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[ImageProcessingMixin]]
    """Always the PIL one: torchvision's gives other pixels than the weights were trained on."""
    disk_name: ClassVar[str | None] = None
    """Level between `vision_tower.` and the weights in LLaVA checkpoints: CLIP's was called vision_model."""
    has_cls: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model  # its parts differ from family to family

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks; each is called with the hidden states alone."""
        return self.model.encoder.layers

    @property
    def num_prefix_tokens(self) -> int:
        """Rows before the patches: CLS, then registers."""
        return int(self.has_cls)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, prefix + N, C]: what the first block reads, positions interpolated to H x W."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden, attention_mask=None)

    def norm(self, block: Any) -> nn.Module:
        """The layer norm in front of a block's attention."""
        return block.layer_norm1

    def query_key(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """A block's q and k projections."""
        return block.self_attn.q_proj, block.self_attn.k_proj

    @property
    def has_probe(self) -> bool:
        """Whether a probe attends to the patches to pool them (SigLIP's head)."""
        return False

    def probe_attention(self, last_output: Tensor) -> Tensor:
        """[B, N] the probe's attention, mean over its heads, from the last block's output [B, N, C]."""
        raise NotImplementedError

    def hidden_states(self, pixel_values: Tensor, indices: Iterable[int]) -> dict[int, Tensor]:
        """The hidden states with these indices (0: embedding, i: output of block i), and no block more."""
        wanted = set(indices)
        found = {0: self.embed(pixel_values)}
        hidden = found[0]
        for index, block in enumerate(self.blocks[: max(wanted)], start=1):
            hidden = self.run_block(block, hidden)
            if index in wanted:
                found[index] = hidden
        return found

    def features(
        self, pixel_values: Tensor, layers: Sequence[int], reads: Collection[str] = ()
    ) -> VisionFeatures:
        """What a reducer reads of B images.

        Args:
            pixel_values: [B, 3, H, W] on the model's device. What does not fill a patch is left out at the
                right and bottom.
            layers: the hidden states that become the patches, side by side where there are several; counted
                as transformers does, -1 is the last.
            reads: which optional fields to fill; those the model cannot give stay None.
        """
        depth, prefix = len(self.blocks), self.num_prefix_tokens
        indices = [layer % (depth + 1) for layer in layers]
        with_probe = "probe_attention" in reads and self.has_probe
        # The block whose output the patches are (none for the embedding), and one at 9/24 of the depth.
        block, mid = indices[0] - 1, int(9 * depth / 24 + 0.5) - 1
        # State i is what block i reads. The last block itself runs for a probe only.
        wanted = [*indices, depth - 1, max(block, 0), mid, depth if with_probe else 0]
        states = self.hidden_states(pixel_values, wanted)
        selected = states[indices[0]]
        if len(indices) > 1:
            selected = torch.cat([states[index] for index in indices], dim=-1)

        normed = self.norm(self.blocks[-1])(states[depth - 1])
        query_projection, key_projection = self.query_key(self.blocks[-1])
        key = self._without_registers(key_projection(normed))
        mean_query = None
        if "mean_query" in reads:  # the projection is affine: the mean's query is the mean query
            mean_query = query_projection(normed[:, prefix:].mean(1))
        patch = self.model.config.patch_size
        return VisionFeatures(
            patches=selected[:, prefix:],
            query=query_projection(normed[:, 0]) if self.has_cls else None,
            key=key,
            num_heads=self.model.config.num_attention_heads,
            grid=(pixel_values.shape[2] // patch, pixel_values.shape[3] // patch),
            cls=selected[:, :1] if "cls" in reads and self.has_cls else None,
            mean_query=mean_query,
            probe_attention=self.probe_attention(states[depth]) if with_probe else None,
            **(self._attention(block, mid, states, reads) if block >= 0 else {}),
        )

    def _attention(
        self, block: int, mid: int, states: dict[int, Tensor], reads: Collection[str]
    ) -> dict[str, Tensor]:
        """What rivals read of the attention in `block` and `mid`: those of block_key, cls_attn, attn_mid and
        attn_deep that are asked for. Without a CLS token there is only block_key."""
        fields: dict[str, Tensor] = {}
        if {"block_key", "cls_attn"} & set(reads):
            query, key = self._query_key(block, states[block])
            fields["block_key"] = self._without_registers(key.flatten(2))
        if "cls_attn" in reads and self.has_cls:
            # One row of the attention map; multiply and sum, because the last bit of a product differs with
            # the size of the batch.
            logits = (query[:, :1].float() * key.float()).sum(3) * query.shape[3] ** -0.5  # [B, rows, H]
            fields["cls_attn"] = logits.softmax(1).transpose(1, 2)[:, :, self.num_prefix_tokens :]
        for name, number in (("attn_mid", mid), ("attn_deep", block)):
            if name in reads and self.has_cls:
                query, key = (x.float().transpose(1, 2) for x in self._query_key(number, states[number]))
                # The whole map, [H, rows, rows] float32 an image (21 MB for 576 patches and 16 heads), so one
                # image at a time.
                scaled = query * query.shape[3] ** -0.5
                received = [
                    (q @ k.transpose(1, 2)).softmax(2).mean((0, 1)) for q, k in zip(scaled, key, strict=True)
                ]
                fields[name] = self._without_registers(torch.stack(received))
        return {name: value for name, value in fields.items() if name in reads}

    def _query_key(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, rows, H, C / H] queries and keys of a block, bias included and unscaled, from what it reads."""
        block = self.blocks[number]
        normed, heads = self.norm(block)(hidden), self.model.config.num_attention_heads
        query, key = (projection(normed).unflatten(2, (heads, -1)) for projection in self.query_key(block))
        return query, key

    def _without_registers(self, rows: Tensor) -> Tensor:
        """[B, rows, ...] without what stands between CLS and the patches."""
        prefix = self.num_prefix_tokens
        return rows if prefix < 2 else torch.cat([rows[:, :1], rows[:, prefix:]], dim=1)


class CLIPEncoder(VisionEncoder):
    """CLIP's image half, LLaVA's own tower."""

    model_class = CLIPVisionModel
    processor_class = CLIPImageProcessorPil
    disk_name = "vision_model"

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.pre_layrnorm(self.model.embeddings(pixel_values, interpolate_pos_encoding=True))


class SiglipEncoder(VisionEncoder):
    """SigLIP: no CLS token, so no query."""

    model_class = SiglipVisionModel
    processor_class = SiglipImageProcessorPil
    disk_name = "vision_model"
    has_cls = False

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.embeddings(pixel_values, interpolate_pos_encoding=True)

    @property
    def has_probe(self) -> bool:
        return self.model.use_head

    def probe_attention(self, last_output: Tensor) -> Tensor:
        head = self.model.head
        hidden = self.model.post_layernorm(last_output)
        return head.attention(head.probe.expand(len(hidden), -1, -1), hidden, hidden)[1].squeeze(1)


class Dinov2Encoder(VisionEncoder):
    """DINOv2. Its position table (37 x 37 as released) is interpolated to the image in `embeddings`."""

    model_class: ClassVar[type[PreTrainedModel]] = Dinov2Model
    processor_class = BitImageProcessorPil

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layer

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.embeddings(pixel_values)

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden)

    def norm(self, block: Any) -> nn.Module:
        return block.norm1

    def query_key(self, block: Any) -> tuple[nn.Module, nn.Module]:
        attention = block.attention
        if hasattr(attention, "q_proj"):
            return attention.q_proj, attention.k_proj
        return attention.attention.query, attention.attention.key  # transformers 5.17


class Dinov2WithRegistersEncoder(Dinov2Encoder):
    """DINOv2 with register tokens between CLS and the patches; they are handed to nobody."""

    model_class = Dinov2WithRegistersModel

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.model.config.num_register_tokens


ENCODERS: dict[str, type[VisionEncoder]] = {
    "clip_vision_model": CLIPEncoder,
    "siglip_vision_model": SiglipEncoder,
    "dinov2": Dinov2Encoder,
    "dinov2_with_registers": Dinov2WithRegistersEncoder,
}
"""Which class serves which `model_type` of a vision config."""
