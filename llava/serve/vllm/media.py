"""Pictures of a request: decoded as everywhere in this package, fetched from where the server allows only."""

import io

import numpy as np
from PIL import Image
from vllm import envs
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

from llava.errors import UserError
from llava.mm_utils import load_image
from llava.serve.vllm import NAME


class LlavaImageIO(ImageMediaIO):
    """`llava.mm_utils.load_image` in place of vLLM's decoding, which turns pictures by their EXIF data and
    puts transparent ones on white: the weights were trained without either."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        try:
            # Reads the header only, and none of the formats for which Pillow starts another program.
            width, height = open_image(io.BytesIO(data)).size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"the picture has too many pixels ({error}): scale it down first") from error
        except Exception as error:  # a broken header raises whatever its reader meets first
            raise ValueError("the picture cannot be read: send a PNG, JPEG or WebP file") from error
        if width * height > envs.VLLM_MAX_IMAGE_PIXELS:
            raise ValueError(
                f"the picture has too many pixels ({width} x {height}; this server takes "
                f"{envs.VLLM_MAX_IMAGE_PIXELS:,}): scale it down first"
            )
        try:
            pixels = np.asarray(load_image(data, name="the picture"))
        except UserError as error:
            raise ValueError(str(error)) from error  # vLLM answers 400 with this sentence
        return MediaWithBytes(Image.fromarray(pixels), data)  # without EXIF data, by which vLLM would turn it


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class LlavaMediaConnector(MediaConnector):
    """Data URLs; http(s) from `--allowed-media-domains`, files below `--allowed-local-media-path`."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        self._check(image_url)
        return self.load_from_url(image_url, LlavaImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(
        self, image_url: str, *, image_mode: str | None = "RGB"
    ) -> MediaWithBytes[Image.Image]:
        self._check(image_url)
        return await self.load_from_url_async(
            image_url, LlavaImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
        )

    def _check(self, url: str) -> None:
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https") and not self.allowed_media_domains:
            raise ValueError(
                "this server fetches no pictures: send a data URL (data:image/png;base64,...), or start it "
                "with --allowed-media-domains HOST"
            )
        if scheme == "data" and not url.partition(",")[0].endswith(";base64"):
            raise ValueError("a data URL is data:image/png;base64, and the picture's file in base64")
        if scheme == "file" and self.allowed_local_media_path is None:
            raise ValueError(
                "this server reads no files: send a data URL, or start it with --allowed-local-media-path DIR"
            )
