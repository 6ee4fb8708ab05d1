"""Pixels to patches: frozen vision transformers that compute what a reducer and the projector read, no more.

The weights live in transformers' own modules (CLIPVisionModel, Dinov2Model, ...); only the way through them
is ours. Image features are taken before the last block, and a reducer wants just that block's keys and the
query of its CLS row, which are functions of the same features. So with LLaVA's `select_layer=-2` the last
block is never run: one layer norm, one Linear for k, and one row of the Linear for q replace it.
"""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
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
from llava.reducers.features import VisionFeatures


class VisionTower(nn.Module):
    """A frozen vision transformer: `tower(pixel_values)` gives the VisionFeatures a reducer reads.

    Subclasses name the parts of one family of models. The tower is always in eval mode and its parameters
    never require grad.

    Args:
        model: the transformers model that holds the weights.
        select_layer: which hidden state becomes the patches, as LLaVA counts: 0 is the embedding, i the
            output of block i, -1 that of the last block, -2 (LLaVA-1.5) the input of the last block.
        select_feature: what `tokens` returns, `patch` (without CLS) or `cls_patch` (CLS first).
        image_processor: turns pictures into `pixel_values`; its crop size is the image size.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[ImageProcessingMixin]]
    """Always the PIL one: torchvision's gives other pixels than the weights were trained on."""
    disk_name: ClassVar[str | None] = None
    """Level between `vision_tower.` and the weights in LLaVA checkpoints: CLIP's was called vision_model."""
    has_cls: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        select_layer: int = -2,
        select_feature: str = "patch",
        image_processor: ImageProcessingMixin | None = None,
    ):
        super().__init__()
        self.vision_tower = nn.ModuleDict({self.disk_name: model}) if self.disk_name else model
        self.config: PreTrainedConfig = model.config
        self.image_processor = image_processor
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.requires_grad_(False)
        self.train(False)

        num_blocks = len(self.blocks)
        if not -num_blocks - 1 <= select_layer <= num_blocks:
            raise UserError(
                f"mm_vision_select_layer {select_layer} does not exist: this tower has {num_blocks} blocks, "
                f"so {-num_blocks - 1} to {num_blocks} are possible (LLaVA-1.5 uses -2)"
            )
        if select_feature not in ("patch", "cls_patch"):
            raise UserError(f"mm_vision_select_feature is 'patch' or 'cls_patch', not {select_feature!r}")
        if select_feature == "cls_patch" and not self.has_cls:
            raise UserError(
                f"mm_vision_select_feature 'cls_patch' needs a tower with a CLS token; "
                f"{self.config.model_type} has none: use 'patch'"
            )

    # What a family of models calls its parts.

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks; each is called with the hidden states alone."""
        return self.backbone.encoder.layers

    def embed(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, prefix + N, C]: what the first block reads, positions interpolated to H x W."""
        raise NotImplementedError

    def last_norm(self) -> nn.Module:
        """The layer norm in front of the last block's attention."""
        return self.blocks[-1].layer_norm1

    def last_query_key(self) -> tuple[nn.Module, nn.Module]:
        """The last block's q and k projections."""
        attention = self.blocks[-1].self_attn
        return attention.q_proj, attention.k_proj

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden, attention_mask=None)

    @property
    def num_prefix_tokens(self) -> int:
        """Rows before the patches: CLS, then registers."""
        return 1

    # The same for all.

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model itself."""
        return self.vision_tower[self.disk_name] if self.disk_name else self.vision_tower

    @property
    def hidden_size(self) -> int:
        """C, the width of a patch."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images this tower is fed with."""
        if self.image_processor is None:
            return self.config.image_size
        return _processor_size(self.image_processor)

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
    def num_patches_per_side(self) -> int:
        return self.grid[0]

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
    def forward(self, pixel_values: Tensor) -> VisionFeatures:
        """Patches with the last block's query and key, for a reducer.

        Args:
            pixel_values: [B, 3, H, W] normalised pixels, any float dtype, on any device. H and W may differ
                from `image_size`; what does not fill a patch is left out at the right and bottom.
        """
        pixel_values = self._checked(pixel_values)
        num_blocks = len(self.blocks)
        # hidden_states[num_blocks - 1] is what the last block reads, whatever layer the patches come from.
        selected, last_input = self._hidden_states(pixel_values, self._selected_index, num_blocks - 1)

        normed = self.last_norm()(last_input)
        query_projection, key_projection = self.last_query_key()
        prefix = self.num_prefix_tokens
        key = key_projection(normed)
        if prefix > 1:  # registers are not patches and not CLS
            key = torch.cat([key[:, :1], key[:, prefix:]], dim=1)
        return VisionFeatures(
            patches=selected[:, prefix:],
            query=query_projection(normed[:, 0]) if self.has_cls else None,
            key=key,
            num_heads=self.config.num_attention_heads,
            grid=self._grid_of(pixel_values),
        )

    @torch.no_grad()
    def tokens(self, pixel_values: Tensor) -> Tensor:
        """All tokens of the selected layer: [B, N, C], or [B, N + 1, C] for `cls_patch`; no query, no key.

        What LLaVA calls image features. Runs no block after the selected layer.
        """
        (selected,) = self._hidden_states(self._checked(pixel_values), self._selected_index)
        patches = selected[:, self.num_prefix_tokens :]
        if self.select_feature == "cls_patch":
            return torch.cat([selected[:, :1], patches], dim=1)
        return patches

    @property
    def _selected_index(self) -> int:
        """`select_layer` counted from the embedding: 0 ... number of blocks."""
        return self.select_layer % (len(self.blocks) + 1)

    def _hidden_states(self, pixel_values: Tensor, *indices: int) -> list[Tensor]:
        """The hidden states with these indices (0: embedding, i: output of block i), and no block more."""
        hidden = self.embed(pixel_values)
        found = {0: hidden}
        for index, block in enumerate(self.blocks[: max(indices)], start=1):
            hidden = self.run_block(block, hidden)
            if index in indices:
                found[index] = hidden
        return [found[index] for index in indices]

    def _checked(self, pixel_values: Tensor) -> Tensor:
        """The pixels on the tower's device and in its dtype."""
        patch = self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or min(pixel_values.shape[2:]) < patch:
            raise UserError(
                f"a vision tower takes pixels of shape [images, 3, height, width] of at least {patch} x "
                f"{patch}, not {list(pixel_values.shape)}"
            )
        return pixel_values.to(device=self.device, dtype=self.dtype)

    def _grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[2:])
        return rows, columns

    def _fits_table(self, pixel_values: Tensor) -> bool:
        return tuple(pixel_values.shape[2:]) == (self.config.image_size, self.config.image_size)


class CLIPTower(VisionTower):
    """CLIP's image half, LLaVA's own tower."""

    model_class = CLIPVisionModel
    processor_class = CLIPImageProcessorPil
    disk_name = "vision_model"

    def embed(self, pixel_values: Tensor) -> Tensor:
        interpolate = not self._fits_table(pixel_values)
        model = self.backbone
        return model.pre_layrnorm(model.embeddings(pixel_values, interpolate_pos_encoding=interpolate))


class SiglipTower(VisionTower):
    """SigLIP: no CLS token, so no query; reducers that need one refuse it."""

    model_class = SiglipVisionModel
    processor_class = SiglipImageProcessorPil
    disk_name = "vision_model"
    has_cls = False

    def embed(self, pixel_values: Tensor) -> Tensor:
        interpolate = not self._fits_table(pixel_values)
        return self.backbone.embeddings(pixel_values, interpolate_pos_encoding=interpolate)

    @property
    def num_prefix_tokens(self) -> int:
        return 0


class Dinov2Tower(VisionTower):
    """DINOv2. Its position table (37 x 37 as released) is interpolated to the image in `embeddings`."""

    model_class = Dinov2Model
    processor_class = BitImageProcessorPil

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.encoder.layer

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.backbone.embeddings(pixel_values)

    def last_norm(self) -> nn.Module:
        return self.blocks[-1].norm1

    def last_query_key(self) -> tuple[nn.Module, nn.Module]:
        attention = self.blocks[-1].attention
        if hasattr(attention, "q_proj"):
            return attention.q_proj, attention.k_proj
        return attention.attention.query, attention.attention.key  # transformers 5.17

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden)


class Dinov2WithRegistersTower(Dinov2Tower):
    """DINOv2 with register tokens between CLS and the patches; they are handed to nobody."""

    model_class = Dinov2WithRegistersModel

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.config.num_register_tokens


TOWERS: dict[str, type[VisionTower]] = {
    "clip_vision_model": CLIPTower,
    "siglip_vision_model": SiglipTower,
    "dinov2": Dinov2Tower,
    "dinov2_with_registers": Dinov2WithRegistersTower,
}
"""Which class serves which `model_type` of a vision config."""


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
    config = _vision_config(path)
    tower_class = TOWERS[config.model_type]
    image_processor = _image_processor(path, tower_class.processor_class)

    # Text weights of a whole CLIP are expected here, so the report about them is noise.
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, info = tower_class.model_class.from_pretrained(
            None if state_dict is not None else path,
            config=config,
            state_dict=state_dict,
            dtype=dtype,
            attn_implementation="sdpa",  # never materialises the attention map
            key_mapping={r"^(model\.)?vision_tower\.": ""},  # a tower inside a llava-hf checkpoint
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # torch, safetensors, zipfile and pickle each have their own
        raise UserError(
            f"cannot read the vision tower's weights in {_weight_files(path)}: {first_line(error)}; "
            "download or copy the file again"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the vision tower in {_weight_files(path)} lacks {len(missing)} weights ({missing[0]}, ...): "
            "download or copy the file again"
        )
    tower = tower_class(
        model, select_layer=select_layer, select_feature=select_feature, image_processor=image_processor
    )
    return tower.to(device=device)


def _vision_config(path: Path) -> PreTrainedConfig:
    """The config of the tower in a directory, or of the tower inside the model in it."""
    if not (path / "config.json").is_file():
        what = "no config.json in it" if path.is_dir() else "no such directory"
        raise UserError(
            f"no vision tower at {path} ({what}): give the directory of a CLIP, SigLIP or DINOv2 model "
            "(--vision-tower PATH)"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path / 'config.json'}: {first_line(error)}") from error
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    if config.model_type not in TOWERS:
        raise UserError(
            f"{path / 'config.json'} describes a {config.model_type!r} model, which cannot serve as vision "
            f"tower: supported are {', '.join(TOWERS)}"
        )
    return config


def _image_processor(path: Path, processor_class: type[ImageProcessingMixin]) -> ImageProcessingMixin:
    """The image processor of a directory."""
    if not (path / "preprocessor_config.json").is_file():
        raise UserError(
            f"the vision tower at {path} has no preprocessor_config.json: copy it from where the tower's "
            "weights came from"
        )
    try:
        return processor_class.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path / 'preprocessor_config.json'}: {first_line(error)}") from error


def _processor_size(image_processor: ImageProcessingMixin) -> int:
    """Side of the square a processor's pictures end as."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return size["height"]


def _weight_files(path: Path) -> str:
    """The weight files of a directory, for a message."""
    names = sorted(file.name for suffix in ("*.safetensors", "*.bin") for file in path.glob(suffix))
    return f"{path} ({', '.join(names) or 'no .safetensors or .bin file'})"
