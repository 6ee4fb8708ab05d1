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
        most = envs.VLLM_MAX_IMAGE_PIXELS
        try:
            # Reads the header only, and none of the formats for which Pillow starts another program.
            width, height = open_image(io.BytesIO(data)).size
        except Exception as error:  # a broken header raises whatever its reader meets first
            what = f"send a PNG, JPEG or WebP file of at most {most:,} pixels"
            raise ValueError(f"the picture cannot be read: {what}") from error
        if width * height > most:
            raise ValueError(
                f"the picture has {width} x {height} pixels, this server takes {most:,}: scale it down"
            )
        try:
            pixels = np.asarray(load_image(data, name="the picture"))
        except UserError as error:
            raise ValueError(str(error)) from error  # vLLM answers 400 with this sentence
        return MediaWithBytes(Image.fromarray(pixels), data)  # without EXIF data, by which vLLM would turn it


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class LlavaMediaConnector(MediaConnector):
    """Data URLs; http(s) from `--allowed-media-domains`, files below `--allowed-local-media-path`."""

    def load_from_url(self, url: str, media_io: object, **how):
        self._check(url)
        return super().load_from_url(url, LlavaImageIO(), **how)

    async def load_from_url_async(self, url: str, media_io: object, **how):
        self._check(url)
        return await super().load_from_url_async(url, LlavaImageIO(), **how)

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
