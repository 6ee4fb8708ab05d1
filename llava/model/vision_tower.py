"""The vision tower of a LLaVA model: an encoder, frozen, with its image processor; and how one is loaded."""

import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging as hf_logging

from llava.errors import UserError, first_line
from llava.mm_utils import tile_side
from llava.model.encoders import ENCODERS
from llava.reducers.features import VisionFeatures


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
