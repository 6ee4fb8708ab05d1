"""How each of transformers' LLaVA classes turns pixels into visual tokens, with a reducer on the way.

Each class here follows `get_image_features` and `get_video_features` of the class that it is named after:
which tower, which layers, whether CLS stays, how tiles and frames are joined. The reducer stands between
tower and projector and sees one tile or one frame at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava.model.encoders import ENCODERS
from llava.reducers import Reducer, VisionFeatures

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
"""Keywords that bring pictures; transformers 5.17 calls VideoLlava's images pixel_values_images."""


def pixels_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those among the keywords of `forward` that bring pictures."""
    return {name: inputs[name] for name in PIXELS if inputs.get(name) is not None and len(inputs[name])}


@dataclass(frozen=True)
class Visual:
    """An image or a video of a prompt: its tokens [K, hidden], and how many placeholders they replace."""

    tokens: Tensor
    placeholders: int


class Llava:
    """LLaVA-1.5; the other classes say in what theirs differs.

    Args:
        model: a ...ForConditionalGeneration of transformers.
        reducer: what makes few tokens of a tile or frame.
    """

    image_tower: ClassVar[str] = "vision_tower"
    video_tower: ClassVar[str] = "vision_tower"

    def __init__(self, model: PreTrainedModel, reducer: Reducer):
        self.model, self.config, self.reducer = model.model, model.config, reducer

    def visuals(self, inputs: Mapping[str, Any]) -> dict[int, list[Visual]]:
        """The images and videos of a batch in the order of the prompts, by the id of their placeholders.

        Args:
            inputs: the keywords of `forward`.
        """
        found = {}
        for name, pixels in pixels_of(inputs).items():
            if name == "pixel_values_videos":
                found[self.config.video_token_id] = self.videos(pixels, inputs)
            else:
                found[self.config.image_token_id] = self.images(pixels, inputs)
        return found

    def images(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Visual]:
        """One Visual for each image of [n, 3, H, W]."""
        tokens, rows = self.reduced(pixels, inputs)
        return [Visual(image, rows) for image in tokens]

    def videos(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Visual]:
        """One Visual for each video of [n, frames, 3, H, W]."""
        raise NotImplementedError

    def keeps_cls(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the rows before the patches go to the language model too."""
        strategy = inputs.get("vision_feature_select_strategy")
        return (strategy or self.config.vision_feature_select_strategy) != "default"

    def layers(self, inputs: Mapping[str, Any]) -> list[int]:
        """Which hidden states of the tower become the patches."""
        for name in ("vision_feature_layer", "vision_feature_layers"):  # VipLlava before 5.23: the latter
            layer = inputs.get(name)
            layer = getattr(self.config, name, None) if layer is None else layer
            if layer is not None:
                return [layer] if isinstance(layer, int) else list(layer)
        raise ValueError("the config names no vision_feature_layer")

    def reduced(
        self,
        pixels: Tensor,
        inputs: Mapping[str, Any],
        *,
        tower: Any = None,
        keeps_cls: bool | None = None,
        pool: Callable[[VisionFeatures], VisionFeatures] | None = None,
    ) -> tuple[list[Tensor], int]:
        """Tower, reducer, projector over B tiles or frames.

        Args:
            pixels: [B, 3, H, W].
            tower: default the images' tower; `keeps_cls` default as `inputs` and config say.
            pool: what the class does to a frame's patches before the projector.

        Returns:
            B tensors [K_i, hidden]; and how many rows the untouched class takes of each tile.
        """
        tower = getattr(self.model, self.image_tower) if tower is None else tower
        keeps_cls = self.keeps_cls(inputs) if keeps_cls is None else keeps_cls
        encoder = ENCODERS[tower.config.model_type](tower)
        if isinstance(encoder.blocks[-1], FSDPModule):  # its weights are whole only while it runs
            raise ValueError(
                "the layers of the vision tower are sharded one by one (FSDP), but reducers read the keys of "
                "the last without running it: shard the language model's layers alone "
                "(transformer_layer_cls_to_wrap in fsdp_config)"
            )
        reads = {*self.reducer.asks, *(["cls"] if keeps_cls else [])}
        features = encoder.features(pixels.to(_device(tower)), self.layers(inputs), reads)
        # The untouched class drops the first row where it does not keep CLS, even where there is none.
        rows = features.patches.shape[1] + encoder.num_prefix_tokens - (not keeps_cls)
        if pool is not None:
            features = pool(features)

        if "projected" in reads:
            features = replace(features, projected=self.model.multi_modal_projector(features.patches))
        blocks = self.reducer(features).unbind()
        if keeps_cls and features.cls is not None:
            blocks = [torch.cat([cls, block]) for cls, block in zip(features.cls, blocks, strict=True)]
        tokens = self.model.multi_modal_projector(torch.cat(blocks))
        return list(tokens.split([len(block) for block in blocks])), rows

    def of_frames(self, pixels: Tensor, inputs: Mapping[str, Any], **options) -> tuple[list[Tensor], int]:
        """`reduced` over the frames of [n, frames, 3, H, W]: one block per video, and the rows of a frame."""
        frames = pixels.shape[1]
        tokens, rows = self.reduced(
            pixels.flatten(0, 1), inputs, tower=getattr(self.model, self.video_tower), **options
        )
        return [torch.cat(tokens[i : i + frames]) for i in range(0, len(tokens), frames)], rows

    def try_out(self) -> None:
        """Reduces an image of noise by each tower, so that a reducer that cannot work raises here and now."""
        if is_deepspeed_zero3_enabled():  # which gathers the weights from its ranks for a training step only
            return
        side = self.config.vision_config.image_size
        noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name in dict.fromkeys((self.image_tower, self.video_tower)):
                self.reduced(noise, {}, tower=getattr(self.model, name))


class VipLlava(Llava):
    """Several layers side by side, CLS always dropped."""

    def keeps_cls(self, inputs: Mapping[str, Any]) -> bool:
        return False


class VideoLlava(Llava):
    """A tower for images and one for videos, whose frames always keep CLS."""

    image_tower = "image_tower"
    video_tower = "video_tower"

    def videos(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Visual]:
        tokens, rows = self.of_frames(pixels, inputs, keeps_cls=True)
        return [Visual(video, rows * pixels.shape[1]) for video in tokens]


class LlavaNext(Llava):
    """AnyRes: an image is an overview and its tiles, reduced one by one and joined flat.

    The line ends of the untouched class go: they need every patch in its place.
    """

    packing_option: ClassVar[str] = "vision_feature_select_strategy"
    """What else `pack_image_features` takes."""

    def images(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Visual]:
        """[n, tiles, 3, H, W], the tiles padded to the most of the batch; or [tiles of all, 3, H, W]."""
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ValueError(
                "this model needs image_sizes with its pixel_values, as the processor gives them"
            )
        tiles = self.tiles(sizes, inputs)
        if pixels.ndim == 5:
            pixels = torch.cat([image[:count] for image, count in zip(pixels, tiles, strict=True)])
        tokens, rows = self.reduced(pixels, inputs)
        if len(tokens) != sum(tiles):
            raise ValueError(f"image_sizes ask for {sum(tiles)} tiles but pixel_values hold {len(tokens)}")
        # Line ends and padding decide how many placeholders an image has: the class itself counts them.
        blank = [torch.zeros(count, rows, 1) for count in tiles]
        option = {self.packing_option: getattr(self.config, self.packing_option)}
        packed, _ = self.model.pack_image_features(blank, sizes, image_newline=torch.zeros(1), **option)
        parts = iter(tokens)
        joined = [torch.cat([next(parts) for _ in range(count)]) for count in tiles]
        newline = self.model.image_newline
        if newline.requires_grad and torch.is_grad_enabled():
            joined[0] = joined[0] + 0 * newline  # unused, but DDP waits for the gradient of all that trains
        return [Visual(image, len(places)) for image, places in zip(joined, packed, strict=True)]

    def tiles(self, sizes: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        """How many tiles each image has, the overview included."""
        config = self.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in sizes
        ]


class LlavaNextVideo(LlavaNext):
    """Frames are pooled by the class's own pooling, then reduced."""

    def videos(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Visual]:
        tokens, rows = self.of_frames(pixels, inputs, pool=self.pooled)
        pooled = (math.isqrt(rows) // self.config.spatial_pool_stride) ** 2
        return [Visual(video, pooled * pixels.shape[1]) for video in tokens]

    def pooled(self, features: VisionFeatures) -> VisionFeatures:
        """Patches as the class pools them, keys and scores by the mean of the same squares."""
        stride, grid = self.config.spatial_pool_stride, features.grid

        def mean(rows: Tensor) -> Tensor:  # [B, N, C] -> [B, N / stride^2, C]
            return F.avg_pool2d(rows.mT.unflatten(2, grid), stride).flatten(2).mT

        key, probe = mean(features.patch_key), features.probe_attention
        return VisionFeatures(
            patches=self.model.vision_resampler(features.patches),
            query=features.query,
            key=torch.cat([features.key[:, :1], key], dim=1) if features.has_cls else key,
            num_heads=features.num_heads,
            grid=(grid[0] // stride, grid[1] // stride),
            mean_query=features.mean_query,
            probe_attention=None if probe is None else mean(probe.unsqueeze(2)).squeeze(2),
        )


class LlavaOnevision(LlavaNext):
    """Several images in a prompt have one tile each. In videos the reducer takes the place of the pooling."""

    packing_option = "vision_aspect_ratio"

    def tiles(self, sizes: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        tiles, batch_num_images = super().tiles(sizes, inputs), inputs.get("batch_num_images")
        if batch_num_images is None:
            return tiles
        alone = [number == 1 for number in batch_num_images for _ in range(number)]
        return [count if single else 1 for count, single in zip(tiles, alone, strict=True)]

    def videos(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Visual]:
        tokens, rows = self.of_frames(pixels, inputs)
        newline = self.model.image_newline.unsqueeze(0)
        # Untouched: a frame pooled to half its side, rounded up; one line end a video.
        pooled = self.model.apply_pooling(torch.zeros(1, rows, 1)).shape[1]
        return [
            Visual(torch.cat([video, newline.to(video)]), pixels.shape[1] * pooled + 1) for video in tokens
        ]


FAMILIES: dict[str, type[Llava]] = {
    f"{family.__name__}ForConditionalGeneration": family
    for family in (Llava, LlavaNext, LlavaNextVideo, LlavaOnevision, VipLlava, VideoLlava)
}
"""By the names of transformers' classes."""


def family_of(cls: type) -> type[Llava]:
    """How the class, or the class of transformers it is a subclass of, makes visual tokens."""
    for base in cls.__mro__:
        if base.__name__ in FAMILIES and base.__module__.startswith("transformers."):
            return FAMILIES[base.__name__]
    raise ValueError(f"a {cls.__name__} cannot be reduced: only {', '.join(FAMILIES)} of transformers")


def _device(tower: nn.Module) -> torch.device:
    """Where the tower computes. Offloaded weights are on `meta`, and accelerate's hooks know."""
    for module in tower.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return device
    return next(tower.parameters()).device
