"""`llava mini world`: composed scenes with questions, in LLaVA's own JSON, for training and for testing.

A scene is 336x336: one to four things, one to a quadrant, on a drawn background; or one or two things and a
rendered word in the other half. Edition 2 has dense scenes beside these: six to twelve things, large and
small, overlapping a little, shapes on large things, words of any size. Everything follows from (edition,
split, seed, index), so any scene can be made again alone. Scenes 2m and 2m+1 share their layout and have
opposite presence answers: yes and no are exactly as frequent over an even number of scenes.

Held out, that is in dev and test scenes only:
  drawings      of each class with several drawings, one (these scenes use it half of the time);
  backgrounds   four families (these scenes use only them);
  compositions  a seventh of all pairs of classes: no train scene holds such a pair, every other scene with
                two or more classes does;
  fonts         one face (these scenes use only this).

Written into DIR: images/NNNNNN.jpg; conversations.json (LLaVA's list of {id, image, conversations}; images
are relative to DIR); objects.jsonl (a row per scene: what is where); questions.jsonl (a row per question, to
be asked alone); world.json (the manifest, written last).
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context
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
SPLITS = ("train", "test", "dev")
VERSION = 4
"""Raise when the same (edition, split, seed, index) gives another scene than before."""

DENSE_SHARE = 0.6  # of the scenes of edition 2
MOST_TURNS = 20  # of a conversation about a dense scene
SCALES = {"small": (28, 48), "large": (90, 130)}  # longest side in pixels, before rotation
MARK_SCALE = (24, 32)
OVERLAP = 0.3
"""Things of a dense scene are moved about until none covers more than this of the smaller one's rectangle."""

# Streams of random numbers: layout is shared by a pair of scenes, the others belong to one scene.
_LAYOUT, _CONTENT, _PIXELS, _QUESTIONS = range(4)


@dataclass(frozen=True)
class World:
    """What decides every scene of a world."""

    split: str
    seed: int = 0
    edition: int = 1

    def rng(self, index: int, stream: int) -> np.random.Generator:
        later = [] if self.edition == 1 else [self.edition]
        return np.random.default_rng([SPLITS.index(self.split), self.seed, index, stream, *later])


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
    size: str | None = None  # in dense scenes: a key of SCALES
    on: str | None = None  # of a mark, a shape that is drawn on a large thing: that thing's class


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `counted`: a class that a counting question is about, or None."""

    index: int
    objects: tuple[Thing, ...]
    counted: str | None
    background: str = ""
    dense: bool = False

    @property
    def image(self) -> str:
        """Where the picture lies, relative to the world's folder."""
        return f"images/{self.index:06d}.jpg"

    @property
    def things(self) -> list[Thing]:
        """All objects but the word and the marks."""
        return [thing for thing in self.objects if not thing.written and thing.on is None]

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
    copies: tuple[int, ...]  # of the first classes, else one; (): this scene has no counting question
    word: bool
    captioned: bool  # its conversation is a description instead of questions
    asks_presence: bool
    coins: tuple[bool, ...]  # presence answers of the even scene; the odd scene has the opposite
    dense: bool


def held_out_pair(a: str, b: str) -> bool:
    """Whether two classes stand together in test scenes only: their places in the alphabet add up to 7k."""
    classes = list(sprites.drawings())
    return a != b and (classes.index(a) + classes.index(b)) % 7 == 0


def layout(world: World, index: int) -> Layout:
    """The layout of the pair that scene `index` belongs to."""
    rng = world.rng(index // 2, _LAYOUT)
    dense = world.edition > 1 and rng.random() < DENSE_SHARE
    kind, word = rng.random(), False
    copies: tuple[int, ...] = ()
    if dense:
        first = int(rng.integers(1, 7))
        word, copies = kind < 0.4, (first, int(rng.integers(1, min(7, 11 - first))))
        classes = int(rng.integers(max(4, 8 - sum(copies)), 15 - sum(copies)))  # 6 to 12 things
    elif kind < 0.30:
        word, classes = True, int(rng.integers(1, 3))
    elif kind < 0.60:
        copies = (int(rng.integers(1, 5)),)
        classes = 1 + int(rng.integers(0, 5 - copies[0]))
    else:
        classes = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.3, 0.25, 0.2]))
    captioned = bool(world.split == "train" and rng.random() < 0.2)
    coins = tuple(bool(c) for c in rng.integers(0, 2, min(classes, 5 if dense else 3)))
    # Of one thing alone either its presence or its name is asked: each answer gives the other away.
    asks_presence = bool(classes > 1 or word or rng.random() < 0.5)
    return Layout(classes, copies, word, captioned, asks_presence, coins, dense)


def choose_classes(rng: np.random.Generator, count: int, split: str) -> list[str]:
    """`count` distinct classes: for train without held-out pairs, else with at least one (count >= 2)."""
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
    if split != "train" and len(kept) < len(options) and rng.random() < 0.5:
        kept = [d for d in options if d.held_out]
    return kept[rng.integers(len(kept))]


def plan(world: World, index: int) -> Scene:
    """Who stands where in scene `index`; boxes and background are still empty."""
    shape, rng = layout(world, index), world.rng(index, _CONTENT)
    classes = choose_classes(rng, shape.classes, world.split)
    copies = dict(zip(classes, shape.copies, strict=False))
    names = [name for name in classes for _ in range(copies.get(name, 1))]
    words, regions = [], list(REGIONS)
    if shape.word:
        row = "top" if rng.random() < 0.5 else "bottom"
        regions = [region for region in REGIONS if not region.startswith(row)]
        fonts = [f for f, held_out in sprites.FONTS.items() if held_out == (world.split != "train")]
        font = str(rng.choice(fonts))
        text = str(rng.choice(sprites.WORDS))
        words = [Thing(text, None, f"{row} left", font, sprites.FONTS[font], written=True)]
    look: dict[str, tuple[sprites.Drawing, str | None]] = {}  # copies look alike

    def thing(name: str, region: str, size: str | None = None) -> Thing:
        if name not in look:
            color = str(rng.choice(list(sprites.COLORS))) if name in sprites.colored_classes() else None
            look[name] = (_drawing(rng, name, world.split), color)
        drawing, color = look[name]
        return Thing(name, color, str(region), drawing.style, drawing.held_out, size=size)

    counted = classes[0] if shape.copies else None
    if not shape.dense:
        placed = zip(names, rng.permutation(regions), strict=False)
        things = [thing(name, region) for name, region in placed]
        return Scene(index, (*words, *things), counted)
    # At most one large thing to a quadrant, three small ones. What is drawn later lies on top.
    tall = [name for name in names if names.count(name) == 1][-int(rng.integers(1, 4)) :]
    small = [name for name in names if name not in tall]
    if words:
        words = [replace(words[0], region=str(rng.choice(regions)))]
    free = [region for region in REGIONS if not words or region != words[0].region]
    hosts = [thing(*place, "large") for place in zip(tall, rng.permutation(free), strict=False)]
    rest = [thing(*place, "small") for place in zip(small, rng.permutation(REGIONS * 3), strict=False)]
    shapes = [shape for shape in rng.permutation(sprites.SHAPES) if shape not in classes]
    marks = []
    for host, name in zip(hosts, shapes[: int(rng.integers(0, 3))], strict=False):
        color = str(rng.choice([color for color in sprites.COLORS if color != host.color]))
        marks.append(Thing(str(name), color, host.region, "flat", False, on=host.name))
    return Scene(index, (*hosts, *marks, *rest, *words), counted, dense=True)


def render(scene: Scene, world: World) -> tuple[Image.Image, Scene]:
    """The picture (RGB 336x336) and the scene with boxes and background filled in."""
    rng = world.rng(scene.index, _PIXELS)
    family, canvas = backgrounds.paint_background(rng, SIZE, held_out=world.split != "train")
    shadow = rng.random() < 0.4
    tint = {t.name: sprites.jittered(sprites.COLORS[t.color], rng) for t in scene.objects if t.color}
    scale = (66, 150 if len(scene.objects) == 1 else 130)
    widths = (120, 220) if world.edition == 1 else (50, 150) if scene.dense else (60, 220)
    placed: list[Thing] = []
    for thing in scene.objects:
        if thing.written:
            tile = _word_tile(rng, thing, widths)
        else:
            sides = MARK_SCALE if thing.on else SCALES[thing.size] if thing.size else scale
            tile = _thing_tile(rng, thing, tint.get(thing.name), sides)
        if thing.on:
            left, top = _place_mark(rng, next(t.box for t in placed if t.name == thing.on), tile.size)
        else:
            tries = [_place(rng, thing, tile.size, scene.dense) for _ in range(20 if scene.dense else 1)]
            left, top = min(tries, key=lambda place: max(OVERLAP, _overlap(place, tile.size, placed)))
        ink = tile.getchannel("A")
        if shadow and not thing.written and not thing.on:
            dark = ink.filter(ImageFilter.GaussianBlur(3)).point(lambda a: a * 0.4)
            canvas.paste((20, 20, 20), (left + 4, top + 5), dark)
        canvas.paste(tile, (left, top), ink)
        box = ink.point(lambda a: 255 * (a > 24)).getbbox()
        box = (max(left + box[0], 0), max(top + box[1], 0), min(left + box[2], SIZE), min(top + box[3], SIZE))
        placed.append(replace(thing, box=box))
    return canvas, replace(scene, objects=tuple(placed), background=family)


def _thing_tile(rng, thing: Thing, rgb, sides: tuple[int, int]) -> Image.Image:
    drawing = next(d for d in sprites.drawings()[thing.name] if d.style == thing.style)
    image = sprites.paint(drawing, rgb)
    scale = rng.uniform(*sides) / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)


def _rgb(color: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = map(int, color)
    return red, green, blue


def _word_tile(rng, thing: Thing, widths: tuple[int, int]) -> Image.Image:
    shown = thing.name.upper() if rng.random() < 0.3 else thing.name
    dark, light = rng.integers(0, 60, 3), rng.integers(225, 256, 3)
    if rng.random() < 0.4:
        ink, plate = _rgb(dark), None
    else:
        pair = (dark, light) if rng.random() < 0.6 else (light, dark)
        ink, plate = map(_rgb, pair)
    tile = sprites.draw_word(shown, thing.style, rng.uniform(*widths), ink, plate)
    return tile.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)


def _place(rng, thing: Thing, size: tuple[int, int], dense: bool) -> tuple[int, int]:
    """Left and top of a tile: centre well inside its quadrant (a word: its half), 22 pixels over at most."""

    def start(side: int, second_half: bool) -> int:
        low, high = max(side / 2 + 3, 0 if dense else 40), min(HALF - 18, HALF + 22 - side / 2)
        centre = rng.uniform(min(low, high), max(low, high))
        return round((SIZE - centre if second_half else centre) - side / 2)

    width, height = size
    row, column = thing.region.split()
    top = start(height, row == "bottom")
    if thing.written and not dense:
        return int(rng.integers(4, max(5, SIZE - width - 3))), top
    return start(width, column == "right"), top


def _place_mark(rng, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Left and top of a mark: its centre in the inner half of its host's box."""
    left, top, right, bottom = box
    x, y = rng.uniform(0.25, 0.75, 2)
    return round(left + x * (right - left) - size[0] / 2), round(top + y * (bottom - top) - size[1] / 2)


def _overlap(place: tuple[int, int], size: tuple[int, int], placed: list[Thing]) -> float:
    """What a tile there and a thing of `placed` have in common at most, as a share of the smaller one."""
    shares = [0.0]
    for x0, y0, x1, y1 in (thing.box for thing in placed):
        width = min(place[0] + size[0], x1) - max(place[0], x0)
        height = min(place[1] + size[1], y1) - max(place[1], y0)
        smaller = min(size[0] * size[1], (x1 - x0) * (y1 - y0))
        shares.append(max(width, 0) * max(height, 0) / smaller)
    return max(shares)


def compose(world: World, index: int) -> tuple[Image.Image, Scene]:
    """Scene `index` of a world: the picture and what it shows."""
    return render(plan(world, index), world)


def interview(world: World, scene: Scene) -> tuple[list[Question], list[Question]]:
    """(questions to be asked alone, turns of one training conversation) about a scene."""
    rng, shape = world.rng(scene.index, _QUESTIONS), layout(world, scene.index)
    coins = [coin != bool(scene.index % 2) for coin in shape.coins]
    questions = ask(rng, scene, coins)
    if shape.captioned:
        return questions, [caption(rng, scene)]
    # A conversation asks about the presence of every class that is there and of as many that are not: one
    # picture costs the same however much is asked about it, and yes or no is what is learnt last.
    here = min(len({thing.name for thing in scene.things}), 4)  # dense: other things too
    asked = presence(rng, scene, rng.permutation([True] * here + [False] * here).tolist())
    asked += [q for q in questions if q.type != "presence"]
    fit = "naming" if shape.asks_presence else "presence"
    alone = len({t.name for t in scene.objects}) == 1
    fitting = [q for q in asked if not (alone and q.type == fit)]
    turns = converse(rng, fitting, names_first=world.edition > 1)
    return questions, turns[: MOST_TURNS if scene.dense else None]


def describe(scene: Scene, image: str) -> dict:
    """The row of objects.jsonl of a scene whose picture is `image`; a thing's name is called class there."""
    objects = [{"class": thing.name, **asdict(thing)} for thing in scene.objects]
    for thing in objects:
        del thing["name"]
        for name in ("size", "on"):  # of dense scenes only
            if thing[name] is None:
                del thing[name]
    row = {"image": image, "background": scene.background, "counted": scene.counted, "objects": objects}
    return row | ({"dense": True} if scene.dense else {})


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
        index, dense = int(Path(row["image"]).stem), row.get("dense", False)
        scenes.append(Scene(index, things, row["counted"], row["background"], dense))
    return scenes


def to_llava(name: str, image: str, turns: list[Question], bare: bool) -> dict:
    """One entry of LLaVA's training JSON; the first turn carries the image tag.

    As in LLaVA's own mixture, the prompt for a short answer is given once and holds for the turns after it.

    Args:
        bare: without that prompt. People ask so, and a model that never saw it describes the picture instead.
    """
    talk: list[dict[str, str]] = []
    for turn in turns:
        text = turn.text.removesuffix(SHORT) if talk or bare else turn.text
        talk += [{"from": "human", "value": text}, {"from": "gpt", "value": turn.answer}]
    talk[0]["value"] = f"<image>\n{talk[0]['value']}"
    return {"id": name, "image": image, "conversations": talk}


def question_rows(questions: list[Question], image: str, index: int) -> list[dict]:
    """The rows of questions.jsonl about picture `index` of a world."""
    return [
        {
            "question_id": index * 100 + number,
            "image": image,
            "type": question.type,
            "form": question.form,
            "text": question.text,
            "answer": question.answer,
            "choices": list(question.choices),
        }
        for number, question in enumerate(questions)
    ]


def _write_scene(world: World, index: int, out: Path) -> tuple[dict, dict, list[dict]]:
    """Write one picture; return its rows of conversations.json, objects.jsonl and questions.jsonl."""
    picture, scene = compose(world, index)
    picture.save(out / scene.image, quality=90)
    questions, turns = interview(world, scene)
    rows = question_rows(questions, scene.image, index)
    name = f"{world.split}-{world.seed}-{index:06d}"
    bare = world.edition > 1 and index % 3 == 0
    return to_llava(name, scene.image, turns, bare), describe(scene, scene.image), rows


def manifest(world: World, count: int) -> dict:
    """world.json before the statistics: everything that tells this world from another."""
    table = sprites.drawings()
    return {
        "version": VERSION,
        "split": world.split,
        "seed": world.seed,
        "n": count,
        **({} if world.edition == 1 else {"edition": world.edition}),
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


def constant_answers(questions: Sequence[dict]) -> dict[str, dict]:
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


def generate(world: World, count: int, out: Path, workers: int = 1) -> dict:
    """Write `count` scenes of a world into `out` and return its manifest. A finished equal world is kept.

    Args:
        workers: processes that draw; what they write does not depend on their number.
    """
    wanted = manifest(world, count)
    done = out / "world.json"
    if done.exists():
        found = json.loads(done.read_text())
        if {**found, "constant_answers": None} == {**wanted, "constant_answers": None}:
            return found
        raise UserError(
            f"{out} already holds another world ({found.get('split')}, seed {found.get('seed')}, "
            f"{found.get('n')} scenes): choose another --out or remove it."
        )
    (out / "images").mkdir(parents=True, exist_ok=True)
    draw = partial(_write_scene, world, out=out)
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext() as pool:
        written = pool.map(draw, range(count), chunksize=16) if pool else map(draw, range(count))
        bar = tqdm(written, f"{world.split} scenes", count, file=sys.stderr, mininterval=1)
        entries, shown, asked = zip(*bar, strict=True)
    questions = [row for rows in asked for row in rows]
    conversations = ",\n".join(map(json.dumps, entries))
    write_text(out / "conversations.json", f"[\n{conversations}\n]\n")
    write_text(out / "objects.jsonl", jsonl(shown))
    write_text(out / "questions.jsonl", jsonl(questions))
    wanted["constant_answers"] = constant_answers(questions)
    write_text(done, json.dumps(wanted, indent=1) + "\n")
    return wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split", choices=SPLITS, required=True, help="dev and test hold what train never shows"
    )
    parser.add_argument("--edition", type=int, choices=(1, 2), default=1, help="2: dense scenes too")
    parser.add_argument("--n", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if min(args.n, args.workers) < 1 or args.seed < 0:
        raise UserError("--n and --workers must be at least 1 and --seed at least 0.")
    # A process takes a second to start: a few scenes are drawn in this one.
    workers = args.workers if args.n >= 100 else 1
    made = generate(World(args.split, args.seed, args.edition), args.n, args.out, workers)
    print(f"{args.out}: {made['n']} {made['split']} scenes, {len(made['classes'])} classes")
    print(f"{'questions':<18} {'n':>7}  constant answer")
    for name, row in made["constant_answers"].items():
        print(f"{name:<18} {row['n']:>7}  {row['constant']} {row['share']:.3f}")
    return 0
