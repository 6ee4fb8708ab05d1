"""Backgrounds drawn with numpy: families of calm patterns in muted colours, some for test scenes only.

Every painter takes (rng, size) and returns [size, size, 3] float32 in 0 to 255. Colours stay between dark and
light and are little saturated, so that black, white and coloured objects all stand out.
"""

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image

Painter = Callable[[np.random.Generator, int], np.ndarray]


def muted(rng: np.random.Generator, low: float = 0.54, high: float = 0.88) -> np.ndarray:
    """A random muted colour [3], 0 to 255, lightness within [low, high]."""
    hsv = rng.uniform(0, 1), rng.uniform(0.02, 0.28), rng.uniform(low, high)
    return np.asarray(colorsys.hsv_to_rgb(*hsv), np.float32) * 255


def near(rng: np.random.Generator, colour: np.ndarray, spread: float = 34) -> np.ndarray:
    """A second colour not far from the first: lighter or darker, slightly tinted."""
    step = rng.uniform(0.4, 1) * spread * (1 if rng.random() < 0.5 else -1)
    return (colour + step + rng.uniform(-9, 9, 3)).clip(90, 235).astype(np.float32)


def blend(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """weight [H, W] in 0..1 between colours a (0) and b (1)."""
    return a + weight[..., None].astype(np.float32) * (b - a)


def noise(rng: np.random.Generator, size: int, cells: int, rows: int | None = None) -> np.ndarray:
    """Smooth noise [size, size] in 0..1: a small random grid, enlarged."""
    grid = rng.random((rows or cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def ramp(size: int, angle: float) -> np.ndarray:
    """Distance along a direction, [size, size], about 0..1."""
    line = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    return line[None, :] * np.float32(np.cos(angle)) + line[:, None] * np.float32(np.sin(angle)) + 0.5


def plain(rng, size):
    return np.broadcast_to(muted(rng), (size, size, 3))


def gradient(rng, size):
    a = muted(rng)
    return blend(ramp(size, rng.uniform(0, 2 * np.pi)).clip(0, 1), a, near(rng, a, 70))


def radial(rng, size):
    a, (x, y) = muted(rng), rng.uniform(0.2, 0.8, 2)
    line = np.linspace(0, 1, size, dtype=np.float32)
    return blend(np.hypot(line[None] - x, line[:, None] - y).clip(0, 1), a, near(rng, a, 70))


def stripes(rng, size):
    a, count, angle = muted(rng), rng.integers(4, 14), rng.uniform(0, np.pi)
    return blend(((ramp(size, angle) * count) % 1 > rng.uniform(0.3, 0.7)) * 1.0, a, near(rng, a))


def checks(rng, size):
    a, cell = muted(rng), rng.integers(20, 60)
    line = np.arange(size) // cell
    return blend((line[None] + line[:, None]) % 2, a, near(rng, a))


def clouds(rng, size):
    a = muted(rng)
    weight = 0.6 * noise(rng, size, 5) + 0.3 * noise(rng, size, 11) + 0.1 * noise(rng, size, 40)
    return blend(weight, a, near(rng, a, 70))


def sky_ground(rng, size):
    sky = blend(ramp(size, np.pi / 2), muted(rng, 0.65, 0.88), muted(rng, 0.7, 0.9))
    ground = blend(noise(rng, size, 24), *(lambda c: (c, near(rng, c, 20)))(muted(rng, 0.45, 0.7)))
    horizon = int(size * rng.uniform(0.35, 0.75))
    return np.concatenate([sky[:horizon], ground[horizon:]])


def wood(rng, size):
    hue = rng.uniform(0.06, 0.1)
    a = (
        np.asarray(colorsys.hsv_to_rgb(hue, rng.uniform(0.25, 0.45), rng.uniform(0.55, 0.8)), np.float32)
        * 255
    )
    grain = 0.6 * noise(rng, size, 6, 60) + 0.4 * noise(rng, size, 3, 150)
    planks = (np.arange(size) % (size // rng.integers(3, 7)) < 2)[:, None] * 0.8
    image = blend((grain + planks).clip(0, 1), a, a * 0.72)
    return image.swapaxes(0, 1) if rng.random() < 0.5 else image


def speckle(rng, size):
    a = muted(rng)
    return blend((noise(rng, size, int(rng.integers(60, 150))) > 0.7) * 1.0, a, near(rng, a, 28))


def tiles(rng, size):
    a, cell, joint = muted(rng), int(rng.integers(34, 80)), int(rng.integers(2, 5))
    line = np.arange(size) + rng.integers(0, cell)
    seam = (line % cell < joint)[None] | (line % cell < joint)[:, None]
    tone = rng.random((size // cell + 3, size // cell + 3), dtype=np.float32)[line // cell][:, line // cell]
    image = blend(tone, a, near(rng, a, 18))
    return np.where(seam[..., None], near(rng, a, 50), image)


def waves(rng, size):
    a, count = muted(rng), rng.uniform(5, 12)
    x = np.linspace(0, 1, size, dtype=np.float32)
    swell = rng.uniform(0.01, 0.05) * np.sin(2 * np.pi * rng.uniform(1, 4) * x + rng.uniform(0, 6))
    image = blend(0.5 + 0.5 * np.sin(2 * np.pi * count * (x[:, None] + swell[None])), a, near(rng, a))
    return image.swapaxes(0, 1) if rng.random() < 0.5 else image


def bokeh(rng, size):
    a = muted(rng)
    weight, line = np.zeros((size, size), np.float32), np.arange(size, dtype=np.float32)
    for x, y, radius in zip(*rng.uniform(0, size, (2, 14)), rng.uniform(15, 60, 14), strict=True):
        squared = (line[None] - x) ** 2 + (line[:, None] - y) ** 2
        weight += 0.4 * (squared < radius * radius)
    return blend(weight.clip(0, 1), a, near(rng, a, 50))


def hills(rng, size):
    image = blend(ramp(size, np.pi / 2), muted(rng, 0.7, 0.9), muted(rng, 0.7, 0.9))
    x, y = np.linspace(0, 1, size, dtype=np.float32), np.linspace(0, 1, size, dtype=np.float32)[:, None]
    for base in (0.45, 0.6, 0.78):
        ridge = base + 0.07 * np.sin(2 * np.pi * rng.uniform(0.7, 2.2) * x + rng.uniform(0, 6))
        image = np.where((y > ridge[None])[..., None], muted(rng, 0.45, 0.8), image)
    return image


TRAIN: dict[str, Painter] = {
    f.__name__: f for f in (plain, gradient, radial, stripes, checks, clouds, sky_ground, wood, speckle)
}
HELD_OUT: dict[str, Painter] = {f.__name__: f for f in (tiles, waves, bokeh, hills)}


def paint_background(rng: np.random.Generator, size: int, *, held_out: bool) -> tuple[str, Image.Image]:
    """A random background of the train or the held-out families: (family, RGB image), slightly grainy."""
    table = HELD_OUT if held_out else TRAIN
    name = list(table)[rng.integers(len(table))]
    pixels = table[name](rng, size)
    grain = rng.integers(-3, 4, (size // 2, size // 2, 1), dtype=np.int8).repeat(2, 0).repeat(2, 1)
    return name, Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
