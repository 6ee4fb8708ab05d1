"""Frames of a video, against one whose every frame is known."""

import builtins
from pathlib import Path

import numpy as np
import pytest

from llava.errors import UserError
from llava.video import read_frames


def write_video(path: Path, greys: list[int]) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in greys:
            picture = np.full((48, 64, 3), grey, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def greys(path: Path, count: int) -> list[int]:
    frames = read_frames(path, count)
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in frames)
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def test_frames_are_spread_evenly_from_first_to_last(tmp_path):
    shown = list(range(10, 210, 20))
    write_video(tmp_path / "film.mp4", shown)
    assert greys(tmp_path / "film.mp4", 4) == pytest.approx([shown[0], shown[3], shown[6], shown[9]], abs=8)
    assert greys(tmp_path / "film.mp4", 50) == pytest.approx(shown, abs=8)


def test_what_is_no_video_is_named(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text\.mp4"):
        read_frames(tmp_path / "text.mp4", 4)
    with pytest.raises(UserError, match=r"none\.mp4"):
        read_frames(tmp_path / "none.mp4", 4)


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_av(name: str, *args: object, **kwargs: object) -> object:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match=r"llava\[video\]"):
        read_frames(tmp_path / "film.mp4", 4)
