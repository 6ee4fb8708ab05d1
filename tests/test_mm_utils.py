"""Images and placeholders: every bad file, every mode, pixels against the reference and plain numpy."""

import base64
import hashlib
import http.server
import io
import json
import struct
import threading
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava import mm_utils
from llava.errors import UserError
from llava.model.tokenization import load_tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_mean=MEAN, image_std=STD
    )


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((300, 200), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises `width` x `height` RGB pixels and holds none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------- bad images


def test_a_good_image_loads_from_path_and_bytes(tmp_path, noise):
    file = tmp_path / "good.png"
    file.write_bytes(encoded(noise, "PNG"))
    for source in (file, str(file), file.read_bytes()):
        assert mm_utils.load_image(source).tobytes() == noise.tobytes()


BAD = {
    "empty": b"",
    "text": b"<html>404 not found</html>",
    "truncated_png": lambda image: encoded(image, "PNG")[:2000],
    "truncated_jpeg": lambda image: encoded(image, "JPEG")[:2000],
    "header_only_png": png_header(64, 64),
    "no_pixels_png": png_header(0, 5),
    "no_pixels_ppm": b"P6 0 7 255\n",
    "bomb": png_header(20_000, 20_000),
    "half_a_bomb": png_header(14_000, 14_000),  # Pillow itself only warns of this one
    "broken_gif": b"GIF89a\x01\x00\x01\x00\x80\x00\x00",
    "broken_tiff": b"II*\x00\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_one_sentence_about_the_file(kind, tmp_path, noise):
    file, data = tmp_path / f"{kind}.img", BAD[kind]
    file.write_bytes(data(noise) if callable(data) else data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            mm_utils.load_image(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_an_address_is_fetched(tmp_path, noise):
    """From a server on this machine; what it does not have is one sentence."""
    (tmp_path / "good.png").write_bytes(encoded(noise, "PNG"))
    handler = partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert mm_utils.load_image(f"{address}/good.png").tobytes() == noise.tobytes()
        with pytest.raises(UserError, match=r"gone\.png.*404"):
            mm_utils.load_image(f"{address}/gone.png")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_bad_base64():
    with pytest.raises(UserError, match="base64"):
        mm_utils.load_image_from_base64("a")
    with pytest.raises(UserError, match="base64"):
        mm_utils.load_image_from_base64(base64.b64encode(b"no image").decode())


def test_base64(noise):
    text = base64.b64encode(encoded(noise, "PNG")).decode()
    assert mm_utils.load_image_from_base64(text).tobytes() == noise.tobytes()


# ------------------------------------------------------------------------------------------------ modes


def modes() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """A file of one colour in every mode, and the RGB it stands for."""
    palette = Image.new("P", (40, 30), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    sixteen = Image.fromarray(np.full((30, 40), 200 * 257, dtype=np.uint16))
    one = Image.new("1", (40, 30), 1)
    return {
        "L": (encoded(Image.new("L", (40, 30), 77), "PNG"), (77, 77, 77)),
        "LA": (encoded(Image.new("LA", (40, 30), (77, 10)), "PNG"), (77, 77, 77)),
        "RGBA": (encoded(Image.new("RGBA", (40, 30), (9, 8, 7, 0)), "PNG"), (9, 8, 7)),
        "P": (encoded(palette, "PNG"), (200, 100, 50)),
        "P transparent": (encoded(palette, "PNG", transparency=b"\xff\x80"), (200, 100, 50)),
        "P transparent gif": (encoded(palette, "GIF", transparency=0), (200, 100, 50)),
        "1": (encoded(one, "PNG"), (255, 255, 255)),
        "I;16": (encoded(sixteen, "PNG"), (200, 200, 200)),
        "I;16 tiff": (encoded(sixteen, "TIFF"), (200, 200, 200)),
        "F": (encoded(Image.new("F", (40, 30), 12.0), "TIFF"), (12, 12, 12)),
        "CMYK": (encoded(Image.new("CMYK", (40, 30), (0, 0, 0, 155)), "TIFF"), (100, 100, 100)),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_becomes_rgb_without_a_warning(mode, processor):
    data, colour = modes()[mode]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = mm_utils.load_image(data)
        pixels = mm_utils.process_images([image], processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert image.mode == "RGB" and image.size == (40, 30)
    assert image.getcolors() == [(1200, colour)]
    centre = pixels[0, :, 168, 168] * torch.tensor(STD) + torch.tensor(MEAN)
    assert torch.allclose(centre * 255, torch.tensor(colour, dtype=torch.float32), atol=0.01)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    got = np.asarray(mm_utils.load_image(encoded(Image.fromarray(values), "PNG")))
    assert np.abs(got[..., 0].astype(float) - values / 257).max() <= 0.5


def test_nan_pixels_are_refused():
    values = np.zeros((4, 4), dtype=np.float32)
    values[1, 2] = np.nan
    with pytest.raises(UserError, match="NaN"):
        mm_utils.load_image(encoded(Image.fromarray(values), "TIFF"))


def test_exif_orientation_only_when_asked(noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    data = encoded(noise, "PNG", exif=exif)
    assert mm_utils.load_image(data).tobytes() == noise.tobytes()
    turned = mm_utils.load_image(data, exif=True)
    assert turned.tobytes() == noise.transpose(Image.Transpose.ROTATE_270).tobytes()


# ----------------------------------------------------------------------------------------------- pixels


def test_pixels_are_the_references(golden, processor):
    folder = golden / "llava" / "images"
    cases = json.loads((folder / "process_images.json").read_text())["cases"]
    arrays = np.load(folder / "process_images.npz")
    pinpoints = "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"
    for case in cases:
        config = SimpleNamespace(image_aspect_ratio=case["mode"], image_grid_pinpoints=pinpoints)
        image = mm_utils.load_image(folder / case["image"])
        got = mm_utils.process_images([image], processor, config)[0]
        assert list(got.shape) == case["shape"], case["key"]
        stride = case["grid_stride"]
        grid = arrays[f"{case['key']}__grid7"]
        assert np.abs(got[..., ::stride, ::stride].numpy() - grid).max() < 1e-6, case["key"]
        shape = (3, 1, 1)
        pixels = got * torch.tensor(STD).view(shape) + torch.tensor(MEAN).view(shape)
        uint8 = (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        assert hashlib.sha256(uint8.tobytes()).hexdigest() == case["sha256_uint8"], case["key"]


@pytest.mark.parametrize("size", [(60, 40), (41, 300), (336, 336)])
def test_pad_is_plain_pillow_and_numpy(size, noise, processor):
    image = noise.resize(size)
    side = max(size)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = (122, 116, 104)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image)
    square = Image.fromarray(canvas).resize((336, 336), Image.Resampling.BICUBIC)
    expected = (np.asarray(square) / 255 - MEAN) / STD
    got = mm_utils.process_images([image], processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert got.dtype == torch.float32
    assert np.abs(got[0].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_batch_is_one_by_one(noise, processor):
    images = [noise, noise.rotate(90, expand=True), noise.convert("L")]
    config = SimpleNamespace(image_aspect_ratio="pad")
    batch = mm_utils.process_images(images, processor, config)
    assert batch.shape == (3, 3, 336, 336)
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(mm_utils.process_images([image], processor, config)[0], row)
    assert mm_utils.process_images([], processor, config) == []


def test_a_config_without_the_field_means_the_processor_alone(noise, processor):
    got = mm_utils.process_images([noise], processor, SimpleNamespace())
    assert torch.equal(got, processor.preprocess(noise, return_tensors="pt")["pixel_values"])


def test_different_shapes_come_as_a_list(noise, processor):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[336, 672], [672, 672]])
    views = [noise.resize((336, 672)), noise.resize((672, 672))]
    got = mm_utils.process_images(views, processor, config)
    assert [tuple(one.shape) for one in got] == [(3, 3, 336, 336), (5, 3, 336, 336)]


def test_anyres_takes_a_siglip_processor(noise):
    """Its size is a height and a width, and it crops nothing; tiles are still what it makes of each view."""
    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 112], [112, 112]])
    got = mm_utils.process_images([noise], processor, config)
    assert got.shape == (1, 5, 3, 56, 56)
    padded = mm_utils.resize_and_pad_image(noise, (112, 112))
    views = [noise.resize((56, 56)), *mm_utils.divide_to_patches(padded, 56)]
    expected = (np.stack([np.asarray(view) for view in views]) / 255 - 0.5) / 0.5
    assert np.abs(got[0].numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-5


def test_square_helpers_are_the_references(text_data):
    helpers = json.loads((text_data / "helpers.json").read_text())
    for case in helpers["expand2square"]:
        white = Image.new("RGB", tuple(case["size"]), (255, 255, 255))
        square = mm_utils.expand2square(white, (0, 0, 0))
        assert list(square.size) == case["out"]
        assert list(square.getbbox()) == case["content_box_xyxy"]
    for case in helpers["anyres"]:
        size = tuple(case["size"])
        points = mm_utils.read_pinpoints(case["pinpoints"])
        best = mm_utils.select_best_resolution(size, points)
        assert list(best) == case["best"], case
        for form in (case["pinpoints"], points):
            assert list(mm_utils.get_anyres_image_grid_shape(size, form, 336)) == case["grid_wh"]
        padded = mm_utils.resize_and_pad_image(Image.new("RGB", size, (255, 255, 255)), best)
        assert list(padded.getbbox()) == case["content_box_xyxy"], case
        assert len(mm_utils.divide_to_patches(padded, 336)) == case["n_patches"]
        columns, rows = (24 * n for n in case["grid_wh"])
        features = torch.zeros(2, rows, columns)
        assert list(mm_utils.unpad_image(features, size).shape[1:]) == case["unpadded_hw"], case


def test_tiles_put_together_are_the_picture(noise):
    padded = mm_utils.resize_and_pad_image(noise, (672, 1008))
    tiles = mm_utils.divide_to_patches(padded, 336)
    again = Image.new("RGB", padded.size)
    for i, tile in enumerate(tiles):
        again.paste(tile, (i % 2 * 336, i // 2 * 336))
    assert again.tobytes() == padded.tobytes()


# ----------------------------------------------------------------------------------------- ids and names


@pytest.fixture(scope="module")
def tokenizers(text_data: Path) -> dict[str, object]:
    return {n: load_tokenizer(text_data / "tokenizers" / f"tok_{n}") for n in ("nonlegacy", "legacy", "mpt")}


def test_ids_around_images_are_the_references(text_data, tokenizers):
    for case in json.loads((text_data / "tokenizer_image_token.json").read_text()):
        index = case.get("image_token_index", -200)
        ids = mm_utils.tokenizer_image_token(case["prompt"], tokenizers[case["tokenizer"]], index)
        assert ids == case["input_ids"], case["prompt"]


def test_ids_as_a_tensor(tokenizers):
    ids = mm_utils.tokenizer_image_token("a <image> b", tokenizers["nonlegacy"])
    tensor = mm_utils.tokenizer_image_token("a <image> b", tokenizers["nonlegacy"], return_tensors="pt")
    assert tensor.dtype == torch.int64 and tensor.tolist() == ids and ids.count(-200) == 1
    with pytest.raises(ValueError, match="return_tensors"):
        mm_utils.tokenizer_image_token("a", tokenizers["nonlegacy"], return_tensors="np")


def test_a_prompt_that_spells_its_bos_loses_nothing_after_an_image(tokenizers):
    """ChatML tokenizers may have `<|im_start|>` as BOS without adding it themselves."""
    tokenizer = tokenizers["mpt"]
    bos = tokenizer.bos_token
    try:
        tokenizer.bos_token = "<|im_start|>"
        ids = mm_utils.tokenizer_image_token("<|im_start|>user\n<image>\nhi", tokenizer)
    finally:
        tokenizer.bos_token = bos
    before, after = (tokenizer(part).input_ids for part in ("<|im_start|>user\n", "\nhi"))
    assert ids == [*before, -200, *after]


def test_stopping_is_the_references(text_data, tokenizers):
    for case in json.loads((text_data / "helpers.json").read_text())["keywords_stopping"]:
        prompt = torch.tensor([case["prompt_ids"]])
        stop = mm_utils.KeywordsStoppingCriteria(case["keywords"], tokenizers["nonlegacy"], prompt)
        said = []
        for n in range(1, len(case["generated"]) + 1):
            said.append(stop(torch.tensor([case["prompt_ids"] + case["generated"][:n]]), None))
        assert said == case["stop_after_each"], case["keywords"]


def test_stopping_waits_for_every_row(tokenizers):
    tokenizer = tokenizers["nonlegacy"]
    stop = mm_utils.KeywordsStoppingCriteria(["###"], tokenizer, torch.zeros(2, 0, dtype=torch.long))
    done = tokenizer("a ###", add_special_tokens=False).input_ids
    other = tokenizer("red blue green tall", add_special_tokens=False).input_ids[: len(done)]
    assert len(other) == len(done)
    assert stop(torch.tensor([done, done]), None)
    assert not stop(torch.tensor([done, other]), None)


def test_model_names_are_the_references(text_data):
    helpers = json.loads((text_data / "helpers.json").read_text())
    for case in helpers["model_name_from_path"]:
        if "error" in case:
            with pytest.raises(IndexError):
                mm_utils.get_model_name_from_path(case["path"])
        else:
            assert mm_utils.get_model_name_from_path(case["path"]) == case["name"]
