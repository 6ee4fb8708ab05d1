"""Pixels to patches: vision transformers that compute what a reducer and the projector read, no more.

The weights live in transformers' own modules (CLIPVisionModel, Dinov2Model, ...); only the way through them
is ours (`VisionEncoder`). Image features are taken before the last block, and a reducer wants just that
block's keys and the query of its CLS row, which are functions of the same features. So with LLaVA's
`select_layer=-2` the last block is never run: one layer norm, one Linear for k, and one row of the Linear for
q replace it. `VisionTower` is such an encoder, frozen, with its image processor: what LLaVA models hold.
"""

import pickle
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging as hf_logging

from llava.errors import UserError, first_line
from llava.mm_utils import tile_side
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
        return 1

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

    @property
    def num_prefix_tokens(self) -> int:
        return 0

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


class VisionTower(nn.Module):
    """A frozen vision transformer: `tower(pixel_values)` gives the VisionFeatures a reducer reads.

    Always in eval mode; its parameters never require grad.

    Args:
        model: the transformers model that holds the weights, of a kind in ENCODERS.
        select_layer: which hidden state becomes the patches, as LLaVA counts: 0 is the embedding, i the
            output of block i, -1 that of the last block, -2 (LLaVA-1.5) the input of the last block.
        select_feature: what `tokens` returns, `patch` (without CLS) or `cls_patch` (CLS first).
        image_processor: turns pictures into `pixel_values`; its crop size is the image size.
        path: the directory it came from, where a CLIP's text half is found if a reducer reads the question.

    Raises:
        UserError: a layer or a CLS row that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        select_layer: int = -2,
        select_feature: str = "patch",
        image_processor: ImageProcessingMixin | None = None,
        path: Path | None = None,
    ):
        super().__init__()
        self.path = path
        self.encoder = ENCODERS[model.config.model_type](model)
        disk_name = self.encoder.disk_name
        self.vision_tower = nn.ModuleDict({disk_name: model}) if disk_name else model
        self.config: PreTrainedConfig = model.config
        self.image_processor = image_processor
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.requires_grad_(False)
        self.train(False)

        depth = len(self.encoder.blocks)
        if not -depth - 1 <= select_layer <= depth:
            raise UserError(
                f"mm_vision_select_layer {select_layer} does not exist: this tower has {depth} blocks, "
                f"so {-depth - 1} to {depth} are possible (LLaVA-1.5 uses -2)"
            )
        if select_feature not in ("patch", "cls_patch"):
            raise UserError(f"mm_vision_select_feature is 'patch' or 'cls_patch', not {select_feature!r}")
        if select_feature == "cls_patch" and not self.encoder.has_cls:
            raise UserError(
                f"mm_vision_select_feature 'cls_patch' needs a tower with a CLS token; "
                f"{self.config.model_type} has none: use 'patch'"
            )

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model itself."""
        return self.encoder.model

    @property
    def hidden_size(self) -> int:
        """C, the width of a patch."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images this tower is fed with."""
        return self.config.image_size if self.image_processor is None else tile_side(self.image_processor)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of one image of `image_size`."""
        side = self.image_size // self.config.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """N, patches of one image of `image_size`."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def train(self, mode: bool = True) -> "VisionTower":
        """Stays in eval mode, whatever the model around it does: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, reads: Collection[str] = ()) -> VisionFeatures:
        """Patches with the last block's query and key, for a reducer.

        Args:
            pixel_values: [B, 3, H, W] normalised pixels, any float dtype, on any device. H and W may differ
                from `image_size`.
            reads: optional fields of VisionFeatures that the reducer reads as well.

        Raises:
            UserError: `image_embeds` of a tower that is no CLIP.
        """
        features = self.encoder.features(self._checked(pixel_values), [self.select_layer], reads)
        if "image_embeds" in reads:
            projection = self.clip.visual_projection
            features = replace(
                features, image_embeds=projection(self.backbone.post_layernorm(features.patches))
            )
        return features

    @cached_property  # which nn.Module does not see: it is not part of the tower's weights
    def clip(self) -> CLIPModel:
        """The whole CLIP that this tower is the vision model of: its text model and its projections.

        Raises:
            UserError: the tower's directory holds no whole CLIP.
        """
        if self.path is None or AutoConfig.from_pretrained(self.path).model_type != "clip":
            raise UserError(
                f"a reducer that compares patches with the question needs a whole CLIP, and {self.path} "
                f"holds a {self.config.model_type} without text half: use the directory of the CLIP that the "
                "tower was taken from (--vision-tower PATH), or another reducer"
            )
        with quiet_loading(), _reading(f"the text half of CLIP in {self.path}"):
            clip: Any = CLIPModel.from_pretrained(self.path, dtype=self.dtype, local_files_only=True)
        del clip.vision_model  # this tower is it
        return clip.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def tokens(self, pixel_values: Tensor) -> Tensor:
        """All tokens of the selected layer: [B, N, C], or [B, N + 1, C] for `cls_patch`; no query, no key.

        What LLaVA calls image features. Runs no block after the selected layer.
        """
        index = self.select_layer % (len(self.encoder.blocks) + 1)
        selected = self.encoder.hidden_states(self._checked(pixel_values), [index])[index]
        patches = selected[:, self.encoder.num_prefix_tokens :]
        if self.select_feature == "cls_patch":
            return torch.cat([selected[:, :1], patches], dim=1)
        return patches

    def _checked(self, pixel_values: Tensor) -> Tensor:
        """The pixels on the tower's device and in its dtype."""
        patch = self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or min(pixel_values.shape[2:]) < patch:
            raise UserError(
                f"a vision tower takes pixels of shape [images, 3, height, width] of at least {patch} x "
                f"{patch}, not {list(pixel_values.shape)}"
            )
        return pixel_values.to(device=self.device, dtype=self.dtype)


def load_vision_tower(
    path: str | Path,
    *,
    select_layer: int = -2,
    select_feature: str = "patch",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    state_dict: dict[str, Tensor] | None = None,
) -> VisionTower:
    """The tower stored in a directory, with its image processor, frozen.

    The directory holds config.json, preprocessor_config.json and the weights (safetensors or .bin, sharded
    or not) of CLIP, SigLIP or DINOv2. A directory of a model that contains a tower (a whole CLIP, a
    llava-hf checkpoint) will do: the tower is what its `vision_config` describes. Keys may or may not carry
    `vision_model.`; those of other parts are ignored.

    Args:
        state_dict: weights to use instead of the files (keys as in a tower directory), for checkpoints that
            carry their own tower.

    Raises:
        UserError: not a directory, unreadable or incomplete weights, a kind of tower we do not know.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        what = "no config.json in it" if path.is_dir() else "no such directory"
        raise UserError(
            f"no vision tower at {path} ({what}): give the directory of a CLIP, SigLIP or DINOv2 model "
            "(--vision-tower PATH)"
        )
    with _reading(path / "config.json"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    if config.model_type not in ENCODERS:
        raise UserError(
            f"{path / 'config.json'} describes a {config.model_type!r} model, which cannot serve as vision "
            f"tower: supported are {', '.join(ENCODERS)}"
        )
    encoder = ENCODERS[config.model_type]

    if not (path / "preprocessor_config.json").is_file():
        raise UserError(
            f"the vision tower at {path} has no preprocessor_config.json: copy it from where the tower's "
            "weights came from"
        )
    with _reading(path / "preprocessor_config.json"):
        image_processor = encoder.processor_class.from_pretrained(path, local_files_only=True)

    names = sorted(file.name for suffix in ("*.safetensors", "*.bin") for file in path.glob(suffix))
    weights = f"{path} ({', '.join(names) or 'no .safetensors or .bin file'})"
    with quiet_loading(), _reading(f"the vision tower's weights in {weights}"):
        loaded: Any = encoder.model_class.from_pretrained(
            None if state_dict is not None else path,
            config=config,
            state_dict=state_dict,
            dtype=dtype,
            attn_implementation="sdpa",  # never materialises the attention map
            key_mapping={r"^(model\.)?vision_tower\.": ""},  # a tower inside a llava-hf checkpoint
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the vision tower in {weights} lacks {len(missing)} weights ({missing[0]}, ...): "
            "download or copy the file again"
        )
    tower = VisionTower(
        model,
        select_layer=select_layer,
        select_feature=select_feature,
        image_processor=image_processor,
        path=path,
    )
    return tower.to(device=device)


@contextmanager
def quiet_loading(size: int = 0) -> Iterator[None]:
    """transformers without its report of unused weights (of CLIP's other half, say), and without a progress
    bar for less than a GiB of them."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if size < 2**30:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


@contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    """Turns what transformers, torch and safetensors raise over a broken file into one sentence about it."""
    try:
        yield
    except (
        *(OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError),
        *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
    ) as error:
        raise UserError(f"cannot read {what}: {first_line(error)}; download or copy it again") from error
