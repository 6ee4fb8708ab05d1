"""Pixels and prompts made ready for the model: loading and processing images, placing `<image>` among ids.

Every image is RGB before anything else happens to it. Image processors are the PIL ones of transformers.
"""

import ast
import base64
import io
import math
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import StoppingCriteria

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.errors import UserError, first_line

MAX_PIXELS = 178_956_970
"""Larger pictures are refused: the bound Pillow warns at (1 GiB of RGBA / 4, 13,377 x 13,377)."""


# ---------------------------------------------------------------------------------------------- loading


def load_image(source: str | Path | bytes, *, exif: bool = False, name: str | None = None) -> Image.Image:
    """One image as RGB.

    `source` is a path, an http(s) address (fetched) or the bytes of a file; `name` is what errors call it
    (default: the path). `exif` turns the picture the way its EXIF orientation says; off by default, because
    the weights were trained without.

    Transparent pixels keep the colour stored under them, 16-bit greys are scaled to 8 bits.
    Raises UserError for a file that is missing, a directory, empty, cut short, no image, without pixels, or
    larger than `MAX_PIXELS`.
    """
    if isinstance(source, bytes):
        label, data = name or "the image", source
    elif str(source).startswith(("http://", "https://")):
        label = name or str(source)
        data = _fetch(str(source))
    else:
        path = Path(source)
        label = name or str(path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{label}: no such image file; check the path and the image folder.") from None
        except IsADirectoryError:
            raise UserError(f"{label} is a directory; give the path of one image file.") from None
        except OSError as error:
            raise UserError(f"{label} cannot be read ({error.strerror}); check its permissions.") from None
    if not data:
        raise UserError(f"{label} is empty (0 bytes); fetch or copy it again.")
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its bound; ours is checked below, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise _too_large(label) from None
    except UnidentifiedImageError:
        raise UserError(f"{label} is not an image this Pillow can read; convert it to PNG or JPEG.") from None
    except Exception as error:  # a broken header raises whatever the format's reader meets first
        raise UserError(
            f"{label} is not a readable image ({first_line(error)}); fetch or convert it again."
        ) from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(label, image.size)
    try:
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
        image = to_rgb(image)
    except Exception as error:  # likewise: OSError, SyntaxError, struct.error, zlib.error ...
        raise UserError(f"{label} is damaged or cut short ({first_line(error)}); fetch it again.") from None
    if image.width == 0 or image.height == 0:
        raise UserError(f"{label} has no pixels ({image.width} x {image.height}); replace it.")
    return image


def _fetch(address: str) -> bytes:
    try:
        # Some servers refuse a client that does not introduce itself.
        request = urllib.request.Request(address, headers={"User-Agent": "llava"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()
    except (OSError, ValueError) as error:  # no network, no such page, no such address
        raise UserError(
            f"{address} cannot be fetched ({first_line(error)}); check it, or download the image first."
        ) from None


def _too_large(label: str, size: tuple[int, int] | None = None) -> UserError:
    shape = f" ({size[0]} x {size[1]} pixels)" if size else ""
    return UserError(
        f"{label} is too large{shape}: at most {MAX_PIXELS:,} pixels are decoded; scale it down first."
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: `convert("RGB")`, but greys of 16 bits are scaled to 8 instead of clipped,
    float pixels that are no numbers raise ValueError, and no mode makes Pillow warn."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))  # 65535 -> 255
    elif image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("it has pixels that are not numbers (NaN or infinite)")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where such a palette goes to RGB directly
    return image.convert("RGB")


def load_image_from_base64(text: str) -> Image.Image:
    """One image as RGB out of the base64 of its file. Errors as `load_image`."""
    try:
        data = base64.b64decode(text)
    except ValueError as error:
        raise UserError(
            f"the image is not base64 ({first_line(error)}); send the bytes of a PNG or JPEG file."
        ) from None
    return load_image(data, name="the base64 image")


# ------------------------------------------------------------------------------------------- processing


def expand2square(image: Image.Image, background_color: tuple[int, ...] | int) -> Image.Image:
    """The image in the middle of a square of its longer side (offset rounded down), or itself if square."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Images as the vision tower takes them, by `model_cfg.image_aspect_ratio`.

    "pad": squared on the processor's mean colour; "anyres": a small copy and tiles, [tiles, 3, S, S] each
    (with `mm_anyres_budget` "papers" of the picture resized to 2 x 2 tiles, aspect not kept); anything else:
    the processor alone (shortest edge to S, centre crop).
    Returns float32 [n, 3, S, S] ([n, tiles, 3, S, S] for anyres), or a list where shapes differ. No image, no
    tensor: an empty list.
    """
    # Harnesses pass whatever config their model has; one without the field means the processor alone.
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    pixels = []
    for image in images:
        image = to_rgb(image)
        if aspect == "anyres":
            pinpoints = model_cfg.image_grid_pinpoints
            if getattr(model_cfg, "mm_anyres_budget", "tile") == "papers":
                pinpoints = [(2 * tile_side(image_processor),) * 2]
                image = image.resize(pinpoints[0])
            pixels.append(process_anyres_image(image, image_processor, pinpoints))
            continue
        if aspect == "pad":
            image = expand2square(image, mean_colour(image_processor))
        pixels.append(_pixels(image, image_processor))
    if pixels and all(p.shape == pixels[0].shape for p in pixels):
        return torch.stack(pixels)
    return pixels


def image_tag(mm_use_im_start_end: bool) -> str:
    """What stands for an image in the prompts of a checkpoint: its config says which."""
    if mm_use_im_start_end:
        return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return DEFAULT_IMAGE_TOKEN


def mean_colour(image_processor: Any) -> tuple[int, ...]:
    """The colour padding takes: the processor's mean, 0..255, rounded down ((122, 116, 104) for CLIP)."""
    return tuple(int(mean * 255) for mean in image_processor.image_mean)


def _pixels(image: Image.Image, image_processor: Any) -> torch.Tensor:
    return image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


# ------------------------------------------------------------------------- anyres (LLaVA-1.6): image tiles


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The (width, height) that keeps most of the picture's pixels; among equals the one that wastes least,
    among those the first."""
    width, height = original_size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - resolution[0] * resolution[1]

    return max(possible_resolutions, key=merit)


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """The image made to fit (width, height), aspect kept, in the middle of black."""
    width, height = image.size
    target_width, target_height = target_resolution
    # The scale first: its rounding decides whether a side of exactly n pixels becomes n + 1, as in training.
    across, down = target_width / width, target_height / height
    if across < down:
        fitted = (target_width, min(math.ceil(height * across), target_height))
    else:
        fitted = (min(math.ceil(width * down), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(fitted), ((target_width - fitted[0]) // 2, (target_height - fitted[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of `patch_size`, row by row."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def read_pinpoints(grid_pinpoints: str | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pinpoints as configs carry them: a list of [width, height], or its text."""
    points = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
    return [(int(width), int(height)) for width, height in points]


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: str | Sequence[Sequence[int]], patch_size: int
) -> tuple[int, int]:
    """Tiles across and down for an image of (width, height), tiles of `patch_size` pixels."""
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[Sequence[int]]
) -> torch.Tensor:
    """Float32 [1 + tiles, 3, S, S]: the whole image squeezed to a square, then its tiles row by row."""
    best = select_best_resolution(image.size, read_pinpoints(grid_pinpoints))
    tiles = divide_to_patches(resize_and_pad_image(image, best), tile_side(processor))
    side = _edge(processor.size)
    return torch.stack([_pixels(view, processor) for view in [image.resize((side, side)), *tiles]])


def tile_side(processor: Any) -> int:
    """Side in pixels of the squares that the processor gives, so of a tile. SigLIP's crops nothing."""
    return _edge(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)


def _edge(size: Any) -> int:
    """CLIP's processor names the shortest edge it resizes to, SigLIP's a height and a width."""
    return dict(size).get("height") or dict(size)["shortest_edge"]


def unpad_image(tensor: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
    """Features [C, H, W] of a padded image without the rows or columns that only saw padding.

    `original_size` is the image's (width, height) before `resize_and_pad_image`.
    """
    width, height = original_size
    rows, columns = tensor.shape[1:]
    if width / height > columns / rows:
        border = (rows - int(height * (columns / width))) // 2
        return tensor[:, border : rows - border, :]
    border = (columns - int(width * (rows / height))) // 2
    return tensor[:, :, border : columns - border]


# ------------------------------------------------------------------------------------------ text and ids


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Ids of a prompt, `image_token_index` where `<image>` stands.

    The text between two `<image>` is tokenised by itself (each piece gets the tokenizer's own prefix space,
    as in training); one BOS stays in front. Returns a list, or with `return_tensors="pt"` an int64 tensor.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f'return_tensors is "pt" or None, not {return_tensors!r}')
    first, *rest = (tokenizer(piece).input_ids for piece in prompt.split(DEFAULT_IMAGE_TOKEN))
    bos = len(tokenizer("").input_ids)  # not by comparing ids: a prompt may spell its BOS itself (ChatML)
    ids = list(first)
    for piece in rest:
        ids += [image_token_index, *piece[bos:]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops `generate` when every row has said one of `keywords`: as its last ids, or in its last text.

    `input_ids` [B, n] is the prompt that generate's ids begin with. (Our `generate` sees new ids only: give
    an empty prompt then, `input_ids[:, :0]`.)
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.keyword_ids = []
        for keyword in self.keywords:
            ids = tokenizer(keyword).input_ids
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(torch.tensor(ids))
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def call_for_batch(self, output_ids: torch.Tensor) -> bool:
        """Whether the one row of `output_ids` [1, n] has said a keyword."""
        row = output_ids[0]
        for ids in self.keyword_ids:
            if len(row) >= len(ids) and torch.equal(row[len(row) - len(ids) :], ids.to(row.device)):
                return True
        new = row[self.start_len :]
        text = ""
        # The window may begin inside a character of several byte tokens; fast tokenizers then lose them all.
        for more in range(4):
            window = new[max(len(new) - self.max_keyword_len - more, 0) :]
            text = self.tokenizer.decode(window, skip_special_tokens=True)
            if not text.startswith("\ufffd"):
                break
        return any(keyword in text for keyword in self.keywords)

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor | None = None, **kwargs: Any) -> bool:
        return all(self.call_for_batch(row.unsqueeze(0)) for row in output_ids)


# ------------------------------------------------------------------------------------------------- names


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path or hub name; `run/checkpoint-12` gives `run_checkpoint-12`."""
    parts = model_path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") else parts[-1]
