"""Frames of a video file as pictures, read by PyAV: pip install 'llava[video]'."""

from pathlib import Path

import numpy as np
from PIL import Image

from llava.errors import UserError


def read_frames(path: str | Path, count: int) -> list[Image.Image]:
    """`count` RGB frames spread evenly over a video, first and last among them; all where it has fewer.

    Raises:
        UserError: PyAV is not installed, no such file, or a file without a readable video.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("reading a video needs PyAV: pip install 'llava[video]'") from error
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        with av.open(str(path)) as container:
            total = container.streams.video[0].frames  # 0 where the file does not say
            total = total or sum(1 for _ in container.decode(video=0))
        wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
        with av.open(str(path)) as container:
            frames = [f.to_image() for n, f in enumerate(container.decode(video=0)) if n in wanted]
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: no video among its streams
        raise UserError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise UserError(f"{path} has no frame that can be read")
    return frames
