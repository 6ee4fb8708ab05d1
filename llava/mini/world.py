"""`llava mini world`: composed scenes with questions, in LLaVA's own JSON, for training and for testing.

A scene is 336x336: one to four things, one to a quadrant, on a drawn background; or one or two things and a
rendered word in the other half. Everything follows from (split, seed, index), so any scene can be made again
alone. Scenes 2m and 2m+1 share their layout and have opposite presence answers: yes and no are exactly as
frequent over an even number of scenes.

Held out, that is in test scenes only:
  drawings      of each class with several drawings, one (test scenes use it half of the time);
  backgrounds   four families (test scenes use only these);
  compositions  a seventh of all pairs of classes: no train scene holds such a pair, every test scene with two
                or more classes does;
  fonts         one face (test scenes use only this).

Written into DIR: images/NNNNNN.jpg; conversations.json (LLaVA's list of {id, image, conversations}; images
are relative to DIR); objects.jsonl (a row per scene: what is where); questions.jsonl (a row per question, to
be asked alone); world.json (the manifest, written last).
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from llava.errors import UserError
from llava.eval.reading import jsonl
from llava.files import write_text
from llava.mini import backgrounds, sprites
from llava.mini.questions import REGIONS, SHORT, Question, ask, caption, class_weights, converse, presence

SIZE = 336
HALF = SIZE // 2
SPLITS = ("train", "test")
VERSION = 4
"""Raise when the same (split, seed, index) gives another scene than before."""

# Streams of random numbers: layout is shared by a pair of scenes, the others belong to one scene.
_LAYOUT, _CONTENT, _PIXELS, _QUESTIONS = range(4)


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `box`: left, top, right, bottom in pixels of the 336 image, tight around it."""

    name: str  # class; of a rendered word, what it says
    color: str | None
    region: str  # one of questions.REGIONS; a written word fills a half and carries its left region
    style: str  # which drawing; of a word, the font
    held_out: bool  # this drawing or font appears in test scenes only
    written: bool = False  # a rendered word
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `counted`: the class a counting question is about, or None."""

    index: int
    objects: tuple[Thing, ...]
    counted: str | None
    background: str = ""

    @property
    def image(self) -> str:
        """Where the picture lies, relative to the world's folder."""
        return f"images/{self.index:06d}.jpg"

    @property
    def things(self) -> list[Thing]:
        """All objects but the word."""
        return [thing for thing in self.objects if not thing.written]

    @property
    def single(self) -> list[Thing]:
        """Things that are the only ones of their class."""
        names = [thing.name for thing in self.things]
        return [thing for thing in self.things if names.count(thing.name) == 1]

    @property
    def word(self) -> str | None:
        """What the rendered word says, if there is one."""
        return next((thing.name for thing in self.objects if thing.written), None)


@dataclass(frozen=True)
class Layout:
    """What the two scenes of a pair share."""

    classes: int  # number of distinct classes
    copies: int  # of the first class; 0: this scene has no counting question (and one copy)
    word: bool
    captioned: bool  # its conversation is a description instead of questions
    asks_presence: bool
    coins: tuple[bool, ...]  # presence answers of the even scene; the odd scene has the opposite


def held_out_pair(a: str, b: str) -> bool:
    """Whether two classes stand together in test scenes only: their places in the alphabet add up to 7k."""
    classes = list(sprites.drawings())
    return a != b and (classes.index(a) + classes.index(b)) % 7 == 0


def _rng(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), seed, index, stream])


def layout(split: str, seed: int, index: int) -> Layout:
    """The layout of the pair that scene `index` belongs to."""
    rng = _rng(split, seed, index // 2, _LAYOUT)
    kind, copies, word = rng.random(), 0, False
    if kind < 0.30:
        word, classes = True, int(rng.integers(1, 3))
    elif kind < 0.60:
        copies = int(rng.integers(1, 5))
        classes = 1 + int(rng.integers(0, 5 - copies))
    else:
        classes = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.3, 0.25, 0.2]))
    captioned = bool(split == "train" and rng.random() < 0.2)
    coins = tuple(bool(c) for c in rng.integers(0, 2, min(classes, 3)))
    # Of one thing alone either its presence or its name is asked: each answer gives the other away.
    return Layout(classes, copies, word, captioned, bool(classes > 1 or word or rng.random() < 0.5), coins)


def choose_classes(rng: np.random.Generator, count: int, split: str) -> list[str]:
    """`count` distinct classes: without held-out pairs for train, with at least one for test (count >= 2)."""
    weights = class_weights()
    chosen: list[str] = []
    while len(chosen) < count:
        free = [name for name in weights if name not in chosen]
        if split == "train":
            free = [name for name in free if not any(held_out_pair(name, other) for other in chosen)]
        elif len(chosen) == 1:
            free = [name for name in free if held_out_pair(name, chosen[0])]
        odds = np.array([weights[name] for name in free])
        chosen.append(str(rng.choice(free, p=odds / odds.sum())))
    return chosen


def _drawing(rng: np.random.Generator, name: str, split: str) -> sprites.Drawing:
    options = sprites.drawings()[name]
    kept = [d for d in options if not d.held_out]
    if split == "test" and len(kept) < len(options) and rng.random() < 0.5:
        kept = [d for d in options if d.held_out]
    return kept[rng.integers(len(kept))]


def plan(split: str, seed: int, index: int) -> Scene:
    """Who stands where in scene `index`; boxes and background are still empty."""
    shape, rng = layout(split, seed, index), _rng(split, seed, index, _CONTENT)
    classes = choose_classes(rng, shape.classes, split)
    names = [classes[0]] * max(shape.copies, 1) + classes[1:]
    things = []
    if shape.word:
        row = "top" if rng.random() < 0.5 else "bottom"
        free = [region for region in REGIONS if not region.startswith(row)]
        font = rng.choice([f for f, held_out in sprites.FONTS.items() if held_out == (split == "test")])
        text = str(rng.choice(sprites.WORDS))
        things.append(Thing(text, None, f"{row} left", str(font), sprites.FONTS[font], written=True))
    else:
        free = list(REGIONS)
    look: dict[str, tuple[sprites.Drawing, str | None]] = {}  # copies look alike
    for name, region in zip(names, rng.permutation(free), strict=False):
        if name not in look:
            color = str(rng.choice(list(sprites.COLORS))) if name in sprites.colored_classes() else None
            look[name] = (_drawing(rng, name, split), color)
        drawing, color = look[name]
        things.append(Thing(name, color, str(region), drawing.style, drawing.held_out))
    return Scene(index, tuple(things), classes[0] if shape.copies else None)


def render(scene: Scene, split: str, seed: int) -> tuple[Image.Image, Scene]:
    """The picture (RGB 336x336) and the scene with boxes and background filled in."""
    rng = _rng(split, seed, scene.index, _PIXELS)
    family, canvas = backgrounds.paint_background(rng, SIZE, held_out=split == "test")
    shadow = rng.random() < 0.4
    tint = {t.name: sprites.jittered(sprites.COLORS[t.color], rng) for t in scene.objects if t.color}
    alone, placed = len(scene.objects) == 1, []
    for thing in scene.objects:
        rgb = tint.get(thing.name)
        tile = _word_tile(rng, thing) if thing.written else _thing_tile(rng, thing, rgb, alone)
        left, top = _place(rng, thing, tile.size)
        ink = tile.getchannel("A")
        if shadow and not thing.written:
            dark = ink.filter(ImageFilter.GaussianBlur(3)).point(lambda a: a * 0.4)
            canvas.paste((20, 20, 20), (left + 4, top + 5), dark)
        canvas.paste(tile, (left, top), ink)
        box = ink.point(lambda a: 255 * (a > 24)).getbbox()
        box = (max(left + box[0], 0), max(top + box[1], 0), min(left + box[2], SIZE), min(top + box[3], SIZE))
        placed.append(replace(thing, box=box))
    return canvas, replace(scene, objects=tuple(placed), background=family)


def _thing_tile(rng, thing: Thing, rgb, alone: bool) -> Image.Image:
    drawing = next(d for d in sprites.drawings()[thing.name] if d.style == thing.style)
    image = sprites.paint(drawing, rgb)
    scale = rng.uniform(66, 150 if alone else 130) / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)


def _rgb(color: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = map(int, color)
    return red, green, blue


def _word_tile(rng, thing: Thing) -> Image.Image:
    shown = thing.name.upper() if rng.random() < 0.3 else thing.name
    dark, light = rng.integers(0, 60, 3), rng.integers(225, 256, 3)
    if rng.random() < 0.4:
        ink, plate = _rgb(dark), None
    else:
        pair = (dark, light) if rng.random() < 0.6 else (light, dark)
        ink, plate = map(_rgb, pair)
    tile = sprites.draw_word(shown, thing.style, rng.uniform(120, 220), ink, plate)
    return tile.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)


def _place(rng, thing: Thing, size: tuple[int, int]) -> tuple[int, int]:
    """Left and top of a tile: centre well inside its quadrant (a word: its half), 22 pixels over at most."""

    def start(side: int, second_half: bool) -> int:
        low, high = max(side / 2 + 3, 40), min(HALF - 18, HALF + 22 - side / 2)
        centre = rng.uniform(min(low, high), max(low, high))
        return round((SIZE - centre if second_half else centre) - side / 2)

    width, height = size
    row, column = thing.region.split()
    top = start(height, row == "bottom")
    if thing.written:
        return int(rng.integers(4, max(5, SIZE - width - 3))), top
    return start(width, column == "right"), top


def compose(split: str, seed: int, index: int) -> tuple[Image.Image, Scene]:
    """Scene `index` of a world: the picture and what it shows."""
    return render(plan(split, seed, index), split, seed)


def interview(split: str, seed: int, scene: Scene) -> tuple[list[Question], list[Question]]:
    """(questions to be asked alone, turns of one training conversation) about a scene."""
    rng, shape = _rng(split, seed, scene.index, _QUESTIONS), layout(split, seed, scene.index)
    coins = [coin != bool(scene.index % 2) for coin in shape.coins]
    questions = ask(rng, scene, coins)
    if shape.captioned:
        return questions, [caption(rng, scene)]
    # A conversation asks about the presence of every class that is there and of as many that are not: one
    # picture costs the same however much is asked about it, and yes or no is what is learnt last.
    here = len({thing.name for thing in scene.things})
    asked = presence(rng, scene, rng.permutation([True] * here + [False] * here).tolist())
    asked += [q for q in questions if q.type != "presence"]
    fit = "naming" if shape.asks_presence else "presence"
    alone = len({t.name for t in scene.objects}) == 1
    return questions, converse(rng, [q for q in asked if not (alone and q.type == fit)])


def describe(scene: Scene, image: str) -> dict:
    """The row of objects.jsonl of a scene whose picture is `image`; a thing's name is called class there."""
    objects = [{"class": thing.name, **asdict(thing)} for thing in scene.objects]
    for thing in objects:
        del thing["name"]
    return {"image": image, "background": scene.background, "counted": scene.counted, "objects": objects}


def read_scenes(folder: Path) -> list[Scene]:
    """What the pictures of a world show, from its objects.jsonl."""
    path = folder / "objects.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no objects.jsonl: make it with `llava mini world --out {folder}`.")
    scenes = []
    for row in map(json.loads, path.read_text().splitlines()):
        things = tuple(
            Thing(name=thing.pop("class"), box=tuple(thing.pop("box")), **thing) for thing in row["objects"]
        )
        scenes.append(Scene(int(Path(row["image"]).stem), things, row["counted"], row["background"]))
    return scenes


def to_llava(name: str, image: str, turns: list[Question]) -> dict:
    """One entry of LLaVA's training JSON; the first turn carries the image tag.

    As in LLaVA's own mixture, the prompt for a short answer is given once and holds for the turns after it.
    """
    talk: list[dict[str, str]] = []
    for turn in turns:
        text = turn.text.removesuffix(SHORT) if talk else f"<image>\n{turn.text}"
        talk += [{"from": "human", "value": text}, {"from": "gpt", "value": turn.answer}]
    return {"id": name, "image": image, "conversations": talk}


def _write_scene(split: str, seed: int, index: int, out: Path) -> tuple[dict, dict, list[dict]]:
    """Write one picture; return its rows of conversations.json, objects.jsonl and questions.jsonl."""
    picture, scene = compose(split, seed, index)
    picture.save(out / scene.image, quality=90)
    questions, turns = interview(split, seed, scene)
    rows = [
        {
            "question_id": index * 100 + number,
            "image": scene.image,
            "type": question.type,
            "form": question.form,
            "text": question.text,
            "answer": question.answer,
            "choices": list(question.choices),
        }
        for number, question in enumerate(questions)
    ]
    name = f"{split}-{seed}-{index:06d}"
    return to_llava(name, scene.image, turns), describe(scene, scene.image), rows


def manifest(split: str, seed: int, count: int) -> dict:
    """world.json before the statistics: everything that tells this world from another."""
    table = sprites.drawings()
    return {
        "version": VERSION,
        "split": split,
        "seed": seed,
        "n": count,
        "classes": {name: [d.style for d in row] for name, row in table.items()},
        "colors": list(sprites.COLORS),
        "colored_classes": sorted(sprites.colored_classes()),
        "words": list(sprites.WORDS),
        "held_out": {
            "drawings": {name: d.style for name, row in table.items() for d in row if d.held_out},
            "backgrounds": list(backgrounds.HELD_OUT),
            "pairs": [[a, b] for a, b in combinations(table, 2) if held_out_pair(a, b)],
            "fonts": [name for name, held_out in sprites.FONTS.items() if held_out],
        },
    }


def constant_answers(questions: list[dict]) -> dict[str, dict]:
    """Per "type/form": number of questions, the most frequent answer and its share (a blind model's)."""
    groups: dict[str, Counter] = {}
    for row in questions:
        groups.setdefault(f"{row['type']}/{row['form']}", Counter())[row["answer"]] += 1
    table = {}
    for name, answers in sorted(groups.items()):
        best, hits = answers.most_common(1)[0]
        total = answers.total()
        table[name] = {"n": total, "constant": best, "share": round(hits / total, 4)}
    return table


def generate(split: str, seed: int, count: int, out: Path) -> dict:
    """Write a world of `count` scenes into `out` and return its manifest. A finished equal world is kept."""
    wanted = manifest(split, seed, count)
    done = out / "world.json"
    if done.exists():
        found = json.loads(done.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return found
        raise UserError(
            f"{out} already holds another world ({found.get('split')}, seed {found.get('seed')}, "
            f"{found.get('n')} scenes): choose another --out or remove it."
        )
    (out / "images").mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(count), desc=f"{split} scenes", file=sys.stderr, mininterval=1)
    entries, shown, asked = zip(*(_write_scene(split, seed, index, out) for index in bar), strict=True)
    questions = [row for rows in asked for row in rows]
    conversations = ",\n".join(map(json.dumps, entries))
    write_text(out / "conversations.json", f"[\n{conversations}\n]\n")
    write_text(out / "objects.jsonl", jsonl(shown))
    write_text(out / "questions.jsonl", jsonl(questions))
    wanted["constant_answers"] = constant_answers(questions)
    write_text(done, json.dumps(wanted, indent=1) + "\n")
    return wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=SPLITS, required=True, help="test holds what train never shows")
    parser.add_argument("--n", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    if args.n < 1 or args.seed < 0:
        raise UserError("--n must be at least 1 and --seed at least 0.")
    world = generate(args.split, args.seed, args.n, args.out)
    print(f"{args.out}: {world['n']} {world['split']} scenes, {len(world['classes'])} classes")
    print(f"{'questions':<18} {'n':>7}  constant answer")
    for name, row in world["constant_answers"].items():
        print(f"{name:<18} {row['n']:>7}  {row['constant']} {row['share']:.3f}")
    return 0
