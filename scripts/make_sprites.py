"""How llava/mini/assets/sprites.{png,json} was made: drawings of Noto Color Emoji on one sheet.

Users never need this; it is kept so that the sheet can be made again or grown. It needs the font file, e.g.
from Debian's fonts-noto-color-emoji 2.042, whose glyphs are 136x128 bitmaps (hence the fixed size 109), and a
Pillow built with raqm (for the drawings that are sequences of code points):

    python scripts/make_sprites.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

sprites.json: {"sheet", "sprites": [{"class", "style", "held_out", "tint", "box": left top right bottom}]};
`held_out` drawings appear in test scenes only; `tint` is the hue of the pixels that take the object's colour
(null: the drawing is used as it is).
"""

import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 104  # longest side of a drawing on the sheet; scenes show it at 60 to 130 pixels
COLUMNS = 10

# class -> drawings as (style, emoji). A "*" marks the held-out one of a class with several drawings.
PLAIN = {
    "dog": [("side", "🐕"), ("face", "🐶"), ("poodle", "🐩"), ("service*", "🐕‍🦺")],
    "cat": [("side", "🐈"), ("face", "🐱"), ("black", "🐈‍⬛"), ("smile*", "😺")],
    "horse": [("gallop", "🐎"), ("face", "🐴"), ("carousel*", "🎠")],
    "cow": [("side", "🐄"), ("face", "🐮"), ("ox*", "🐂")],
    "pig": [("face", "🐷")],
    "rabbit": [("face", "🐰")],
    "bear": [("brown", "🐻"), ("teddy", "🧸"), ("polar*", "🐻‍❄️")],
    "monkey": [("side", "🐒"), ("face", "🐵"), ("eyes*", "🙈")],
    "bird": [("blue", "🐦"), ("parrot", "🦜"), ("eagle", "🦅"), ("dove*", "🕊️")],
    "fish": [("blue", "🐟"), ("striped", "🐠"), ("puffer*", "🐡")],
    "snake": [("green", "🐍")],
    "frog": [("face", "🐸")],
    "elephant": [("side", "🐘")],
    "lion": [("face", "🦁")],
    "tree": [("round", "🌳"), ("fir", "🌲"), ("palm", "🌴"), ("christmas*", "🎄")],
    "flower": [("cherry", "🌸"), ("sunflower", "🌻"), ("hibiscus", "🌺"), ("tulip", "🌷"), ("daisy*", "🌼")],
    "apple": [("red", "🍎"), ("green*", "🍏")],
    "banana": [("peeled", "🍌")],
    "pizza": [("slice", "🍕")],
    "cake": [("birthday", "🎂"), ("slice", "🍰"), ("cupcake*", "🧁")],
    "bus": [("side", "🚌"), ("trolley", "🚎"), ("front*", "🚍")],
    "train": [("steam", "🚂"), ("front", "🚆"), ("bullet", "🚅"), ("fast*", "🚄")],
    "bike": [("side", "🚲")],
    "boat": [("sail", "⛵"), ("speed", "🚤"), ("ship", "🚢"), ("ferry*", "⛴️")],
    "plane": [("jet", "✈️"), ("small*", "🛩️")],
    "rocket": [("up", "🚀")],
    "house": [("plain", "🏠"), ("derelict", "🏚️"), ("garden*", "🏡")],
    "clock": [("alarm", "⏰"), ("wall", "🕒"), ("mantel*", "🕰️")],
    "key": [("gold", "🔑"), ("old*", "🗝️")],
    "ball": [("soccer", "⚽"), ("basketball", "🏀"), ("baseball", "⚾"), ("volleyball*", "🏐")],
    "guitar": [("electric", "🎸")],
    "chair": [("wooden", "🪑")],
    "cup": [("coffee", "☕"), ("tea*", "🍵")],
}
# The same, with the colour family that is replaced: its hue in degrees.
TINTED = {
    "car": [("side", "🚗", 0), ("wagon", "🚙", 215), ("front*", "🚘", 0)],
    "book": [("closed", "📕", 0)],
    "hat": [("cap", "🧢", 215)],
    "shoe": [("sneaker", "👟", 210), ("heel", "👠", 0), ("flat*", "🥿", 210)],
    "umbrella": [("open", "☂️", 260), ("rain*", "☔", 260)],
    "balloon": [("round", "🎈", 0)],
}


def draw(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph as RGBA, cut to its ink, its longest side SIZE."""
    canvas = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(canvas).text((10, 15), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 140:
        raise SystemExit(f"{emoji}: the font or this Pillow (raqm?) does not draw it as one glyph")
    glyph = canvas.crop(box)
    scale = SIZE / max(glyph.size)
    return glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent.parent / "llava/mini/assets"
    )
    args = parser.parse_args()
    font = ImageFont.truetype(args.font, 109)
    drawings = [(name, style, emoji, None) for name, row in PLAIN.items() for style, emoji in row]
    drawings += [(name, style, emoji, hue) for name, row in TINTED.items() for style, emoji, hue in row]

    sheet = Image.new("RGBA", (COLUMNS * SIZE, math.ceil(len(drawings) / COLUMNS) * SIZE))
    rows = []
    for position, (name, style, emoji, hue) in enumerate(drawings):
        glyph = draw(emoji, font)
        left, top = position % COLUMNS * SIZE, position // COLUMNS * SIZE
        sheet.paste(glyph, (left, top))
        rows.append(
            {
                "class": name,
                "style": style.rstrip("*"),
                "held_out": style.endswith("*"),
                "tint": hue,
                "box": [left, top, left + glyph.width, top + glyph.height],
            }
        )
    args.out.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out / "sprites.png", optimize=True)
    text = ",\n".join("  " + json.dumps(row) for row in rows)
    (args.out / "sprites.json").write_text(f'{{"sheet": "sprites.png", "sprites": [\n{text}\n]}}\n')
    size = (args.out / "sprites.png").stat().st_size
    print(f"{len(rows)} drawings of {len(PLAIN) + len(TINTED)} classes, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
