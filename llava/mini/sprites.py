"""What can stand in a scene: drawings, the colours they take, and rendered words.

Two kinds of drawings share one type: those cut from assets/sprites.png (Noto Color Emoji, SIL OFL 1.1) and
five geometric shapes made here. A drawing that takes colours carries a mask and a shade per pixel, so that
painting it is one multiplication. A class with several drawings keeps one of them for the test split.
"""

import colorsys
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parent / "assets"
SIZE = 104
"""Longest side of a drawing in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (250, 135, 20),
    "yellow": (252, 220, 40),
    "green": (40, 160, 65),
    "blue": (35, 90, 220),
    "purple": (140, 50, 185),
    "black": (28, 28, 30),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SHAPE_STYLES = {"flat": False, "outlined": False, "glossy": True}  # style -> held out
PLURALS = {"fish": "fish", "bus": "buses"}  # where an s at the end is wrong

# fmt: off
WORDS = (
    "open", "stop", "exit", "sale", "bank", "park", "food", "shop", "love", "fire",
    "gold", "north", "south", "east", "west", "home", "road", "game", "music", "post",
    "push", "pull", "hello", "water", "night", "light", "peace", "time", "team", "free",
    "new", "city", "school", "king", "lake", "menu", "news", "radio", "video", "zero",
)
# fmt: on
FONTS = {  # file in matplotlib's fonts/ttf -> held out
    "DejaVuSans": False,
    "DejaVuSans-Bold": False,
    "DejaVuSans-Oblique": False,
    "DejaVuSansMono": False,
    "DejaVuSansMono-Bold": False,
    "DejaVuSerif": False,
    "DejaVuSerif-Bold": True,
}


@dataclass(frozen=True)
class Drawing:
    """One way to draw a class. `tint` None: used as it is; else it must be painted with a colour."""

    name: str
    style: str
    held_out: bool
    rgba: np.ndarray  # [h, w, 4] uint8
    tint: tuple[np.ndarray, np.ndarray] | None  # mask [h, w, 1] bool, shade [h, w, 1] float32 around 1


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _tint_of(rgba: np.ndarray, hue: float) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a colour family (within 45 degrees of `hue`, saturated) and how light each is."""
    hsv = np.asarray(Image.fromarray(rgba).convert("RGB").convert("HSV"), dtype=np.float32)
    distance = np.abs((hsv[..., :1] * (360 / 255) - hue + 180) % 360 - 180)
    mask = (distance < 45) & (hsv[..., 1:2] > 85) & (rgba[..., 3:] > 0)
    light = rgba[..., :3].astype(np.float32).max(axis=-1, keepdims=True)
    return mask, light / np.median(light[mask])


def _shape_outline(name: str) -> list[tuple[float, float]]:
    """Corner points of a shape in the unit square."""
    if name == "circle":
        turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        return [(0.5 + 0.49 * math.cos(t), 0.5 + 0.49 * math.sin(t)) for t in turn]
    if name == "square":
        return [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)]
    if name == "triangle":
        return [(0.5, 0.05), (0.98, 0.93), (0.02, 0.93)]
    if name == "star":
        points = []
        for k in range(10):
            radius, t = (0.5 if k % 2 == 0 else 0.21), math.pi * (k / 5 - 0.5)
            points.append((0.5 + radius * math.cos(t), 0.53 + radius * math.sin(t)))
        return points
    turn = np.linspace(0, 2 * math.pi, 80, endpoint=False)  # heart
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return [(0.5 + a / 34, 0.47 - b / 34) for a, b in zip(x, y, strict=True)]


def _shape(name: str, style: str) -> Drawing:
    big = 4 * SIZE
    points = [(x * big, y * big) for x, y in _shape_outline(name)]
    inside = Image.new("L", (big, big))
    ImageDraw.Draw(inside).polygon(points, fill=255)
    alpha = np.asarray(inside.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    shade = np.ones((SIZE, SIZE), np.float32)
    if style == "outlined":
        rim = Image.new("L", (big, big))
        ImageDraw.Draw(rim).line([*points, points[0], points[1]], fill=255, width=28, joint="curve")
        shade -= 0.5 / 255 * np.asarray(rim.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    elif style == "glossy":
        y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
        shade += 0.25 - 0.6 * np.hypot(x - 0.38, y - 0.35).astype(np.float32)
    rgba = np.dstack([np.full((SIZE, SIZE, 3), 255, np.uint8), alpha])
    return Drawing(name, style, SHAPE_STYLES[style], rgba, (alpha[..., None] > 0, shade[..., None]))


@functools.cache
def drawings() -> dict[str, tuple[Drawing, ...]]:
    """All classes in a fixed order, each with its drawings."""
    index = json.loads((ASSETS / "sprites.json").read_text())
    with Image.open(ASSETS / index["sheet"]) as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    table: dict[str, list[Drawing]] = {}
    for row in index["sprites"]:
        left, top, right, bottom = row["box"]
        rgba = pixels[top:bottom, left:right]
        tint = None if row["tint"] is None else _tint_of(rgba, row["tint"])
        table.setdefault(row["class"], []).append(
            Drawing(row["class"], row["style"], row["held_out"], rgba, tint)
        )
    for name in SHAPES:
        table[name] = [_shape(name, style) for style in SHAPE_STYLES]
    return {name: tuple(row) for name, row in sorted(table.items())}


@functools.cache
def colored_classes() -> frozenset[str]:
    """Classes whose objects have one nameable colour."""
    return frozenset(name for name, row in drawings().items() if row[0].tint is not None)


def jittered(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[float, float, float]:
    """A colour near `rgb` (hue +-4 degrees, lightness +-8 %), 0 to 255."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    hue = (hue + rng.uniform(-4, 4) / 360) % 1
    value = min(1.0, value * rng.uniform(0.92, 1.08))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return red * 255, green * 255, blue * 255


def paint(drawing: Drawing, rgb: tuple[float, float, float] | None) -> Image.Image:
    """The drawing as RGBA in a colour. Shades under 1 darken the colour, over 1 mix it with white."""
    if drawing.tint is None:
        return Image.fromarray(drawing.rgba)
    if rgb is None:
        raise ValueError(f"{drawing.name}/{drawing.style} must be given a color")
    mask, shade = drawing.tint
    color = np.asarray(rgb, np.float32)
    out = color * np.minimum(shade, 1) + (255 - color) * np.clip(shade - 1, 0, 1)
    pixels = drawing.rgba.copy()
    pixels[..., :3] = np.where(mask, out.clip(0, 255).astype(np.uint8), pixels[..., :3])
    return Image.fromarray(pixels)


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size)


def draw_word(
    text: str, font: str, width: float, ink: tuple[int, int, int], plate: tuple[int, int, int] | None
) -> Image.Image:
    """A word about `width` pixels wide (at most 64 high) as RGBA, on a plate (a sign) or on nothing."""
    probe = _font(font, 40)
    left, top, right, bottom = probe.getbbox(text)
    size = int(40 * min(width / (right - left), 64 / (bottom - top)))
    face = _font(font, max(size, 12))
    left, top, right, bottom = face.getbbox(text)
    pad = 9 if plate else 1
    tile = Image.new("RGBA", (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad), (*ink, 0))
    draw = ImageDraw.Draw(tile)
    if plate:
        draw.rounded_rectangle((0, 0, tile.width - 1, tile.height - 1), 7, fill=(*plate, 255))
    draw.text((pad - left, pad - top), text, font=face, fill=(*ink, 255))
    return tile
