"""Pictures of what a reducer did: drawn from provenance alone, pixel by pixel as they should be."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import Family, edit_json, family

from llava import pictures
from llava.analysis import show
from llava.errors import UserError
from llava.mm_utils import mean_colour, process_images, resize_and_pad_image
from llava.model.vision_tower import load_vision_tower
from llava.reducers import ReducedTokens, VisionFeatures, build_reducer

GRID = (3, 4)
POINTS = [[56, 112], [112, 112]]
C = pictures.CELL


def reduced(kept: list[int], source: list[int]) -> ReducedTokens:
    return ReducedTokens(
        tokens=torch.zeros(1, len(kept), 8),
        lengths=torch.tensor([len(kept)]),
        kept=torch.tensor([kept]),
        source=torch.tensor([source]),
    )


# Patch 5 is token 0, patch 10 token 1; the rest goes to them, patch 3 nowhere; token 2 stands for no patch.
EXAMPLE = reduced([5, 10, -1], [0, 0, 1, -1, 0, 0, 1, 1, 1, 1, 1, 1])


@pytest.fixture
def picture() -> Image.Image:
    """12 patches of noise whose mean is the same everywhere, 20 pixels a side."""
    noise = np.random.default_rng(0).integers(90, 160, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def inside(image: Image.Image, patch: int) -> np.ndarray:
    """A patch's pixels without its frame."""
    y, x = divmod(patch, GRID[1])
    return np.asarray(image)[y * C + 3 : (y + 1) * C - 3, x * C + 3 : (x + 1) * C - 3].astype(float)


def test_where_patches_went():
    what = pictures.Assignment.of(EXAMPLE)
    assert np.flatnonzero(what.kept).tolist() == [5, 10]
    assert np.flatnonzero(~what.merged & ~what.kept).tolist() == [3]
    assert what.tokens == 3


def test_kept_patches_stay_as_they_are_and_others_do_not(picture):
    painted = pictures.overlay(picture, EXAMPLE, GRID)
    canvas = picture.resize(painted.size, Image.Resampling.LANCZOS)
    assert painted.size == (GRID[1] * C, GRID[0] * C)
    for patch in range(12):
        same = np.array_equal(inside(painted, patch), inside(canvas, patch))
        assert same is (patch in (5, 10)), patch
    assert inside(painted, 3).mean() < 0.5 * inside(painted, 2).mean()  # dropped is darker than merged


def test_patches_of_one_token_share_its_tint():
    grey = Image.new("RGB", (80, 60), (128, 128, 128))
    painted = pictures.overlay(grey, EXAMPLE, GRID)
    colour = {patch: tuple(inside(painted, patch)[0, 0]) for patch in range(12)}
    first, second = {colour[patch] for patch in (0, 1, 4)}, {colour[patch] for patch in (2, 6, 7, 8, 9, 11)}
    assert len(first) == len(second) == 1
    assert np.abs(np.subtract(first.pop(), second.pop())).max() > 30
    assert len(set(colour[3])) == 1  # dropped: no tint


def test_pixels_become_the_picture_again(tiny, picture):
    """The picture padded to a square of the tower's size, as the image processor made it."""
    processor = load_vision_tower(tiny.tower).image_processor
    padded = Image.new("RGB", (80, 80), mean_colour(processor))
    padded.paste(picture, (0, 10))
    side = processor.crop_size["height"]
    wanted = padded.resize((side, side), Image.Resampling.BICUBIC)
    pixels = process_images([picture], processor, SimpleNamespace(image_aspect_ratio="pad"))
    (seen,) = pictures.squares(pixels, processor)
    assert np.array_equal(np.asarray(seen), np.asarray(wanted))


def test_tiles_lie_where_they_were_cut(tiny):
    """Beside the picture as a whole its tiles make up the picture they were cut from."""
    processor = load_vision_tower(tiny.tower).image_processor
    config = SimpleNamespace(
        image_aspect_ratio="anyres", mm_anyres_budget="tile", image_grid_pinpoints=POINTS
    )
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 255, (90, 160, 3), dtype=np.uint8))
    (pixels,) = process_images([wide], processor, config)
    across = pictures.tiles_across(wide.size, pixels, config)
    sheet = pictures.arrange(pictures.squares(pixels, processor), across, gap=5)
    assert sheet.size == (3 * 56 + 5, 2 * 56)
    assert np.array_equal(np.asarray(sheet)[:, 61:], np.asarray(resize_and_pad_image(wide, (112, 112))))


@pytest.mark.parametrize(("name", "cls"), [("topk", True), ("prumerge+", True), ("pool", False)])
def test_four_panels_of_every_kind_of_reducer(name, cls, tmp_path):
    generator = torch.Generator().manual_seed(3)
    patches, key = torch.randn(1, 64, 16, generator=generator), torch.randn(1, 65, 16, generator=generator)
    query = torch.randn(1, 16, generator=generator) * 4
    one = VisionFeatures(patches, query if cls else None, key if cls else key[:, 1:], 2, (8, 8))
    out = tmp_path / "made" / "sheet.png"
    show.figure([Image.new("RGB", (64, 64))], one, [build_reducer(name)(one)], title=name, out=out)
    with Image.open(out) as sheet:
        assert sheet.width > 1500
    assert [file.name for file in out.parent.iterdir()] == ["sheet.png"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Family:
    return family(tmp_path_factory.mktemp("tiny"))


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    return show.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command(tiny, picture, tmp_path, capsys):
    picture.save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    flags = ("--vision-tower", tiny.tower, "--reducer", "topk(tokens=4)", "--out", out)
    assert run(tmp_path / "in.png", *flags) == 0
    said = capsys.readouterr().out
    assert "topk(tokens=4)" in said and "of 16 visual tokens" in said and str(out) in said
    with Image.open(out) as sheet:
        sheet.verify()


def test_a_checkpoint_brings_its_tower_and_its_reducer(tiny, picture, tmp_path, capsys):
    picture.save(tmp_path / "in.png")
    checkpoint = tiny.copied_to(tmp_path / "copy").lora
    edit_json(checkpoint / "config.json", mm_token_reducer="grid(tokens=4)")
    assert run(tmp_path / "in.png", "--model-path", checkpoint, "--out", tmp_path / "o.png") == 0
    assert capsys.readouterr().out.startswith("grid(tokens=4): 4 of 16")


def test_reducers_that_read_projector_or_question(tiny, picture, tmp_path, capsys):
    picture.save(tmp_path / "in.png")
    common = "--out", tmp_path / "o.png", "--reducer"
    model = "--model-path", tiny.full
    assert run(tmp_path / "in.png", *model, *common, "divprune(tokens=5)") == 0
    assert run(tmp_path / "in.png", *model, *common, "mmtok(tokens=6)", "--question", "A red car?") == 0
    said = capsys.readouterr().out
    assert "5 of 16" in said and "6 of 16" in said
    for more, words in ((["divprune"], "--model-path"), (["mmtok", *model], "--question")):
        with pytest.raises(UserError, match=words):
            run(tmp_path / "in.png", "--vision-tower", tiny.tower, *common, *more)


@pytest.mark.parametrize("budget", ["tile", "shared", "papers"])
def test_the_tiles_of_an_anyres_checkpoint(budget, tiny, picture, tmp_path, capsys):
    picture.save(tmp_path / "in.png")
    checkpoint = tiny.copied_to(tmp_path / "copy").lora
    edit_json(
        checkpoint / "config.json",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=POINTS,
        mm_anyres_budget=budget,
        mm_token_reducer=f"topk(tokens={4 if budget == 'tile' else 20})",
    )
    assert run(tmp_path / "in.png", "--model-path", checkpoint, "--out", tmp_path / "o.png") == 0
    said, noise = capsys.readouterr()
    assert "20 of 80 visual tokens" in said and noise == ""
    with Image.open(tmp_path / "o.png") as sheet:
        assert sheet.width < 1.5 * sheet.height  # two rows of panels and the curve


@pytest.mark.parametrize(
    ("more", "words"), [(("--out", "picture.bmpx"), ".png"), (("--device", "gpu0"), "gpu0")]
)
def test_bad_arguments_leave_nothing_behind(more, words, tiny, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    with pytest.raises(UserError, match=words):
        run("in.png", "--vision-tower", tiny.tower, *more)
    assert [file.name for file in tmp_path.iterdir()] == ["in.png"]


def test_without_the_small_tower_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="llava mini prepare"):
        run("in.png")
