"""What can be asked about a scene: questions with one short answer, and conversations made of them.

Six types -- presence, naming, colour, counting, position, words --, in dense scenes also `small` (naming of
small things) and `parts` (shapes drawn on things), in three forms: `open` (a word or phrase), `yesno`, and
`choice` (the option's letter). Each ends with LLaVA's own prompt for short answers, so that the benchmarks'
prompts are nothing new to a model trained on these.

`ask` gives all questions of a scene: for evaluation, one at a time. `converse` picks from them the turns of
one training conversation, leaving out what earlier turns have given away, so that answers must be looked up
in the picture and not in the text before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llava.eval.benchmarks.base import LETTER, SHORT
from llava.mini.sprites import COLORS, SHAPES, WORDS, article, colored_classes, drawings, plural

T = TypeVar("T")
REGIONS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = dict(enumerate(("one", "two", "three", "four", "five", "six"), 1))  # the last two: dense scenes
LETTERS = "ABCD"
NO_OCR_TOKENS = "\nReference OCR token: "
"""TextVQA's prompt where its reader found nothing; some questions about words carry it in training."""

TEMPLATES: dict[tuple[str, str], tuple[str, ...]] = {
    ("presence", "yesno"): (
        "Is there {a_name} in the picture?",
        "Is there {a_name} in the image?",
        "Can you see {a_name} in this image?",
    ),
    ("naming", "open"): (
        "What is in the {region} of the picture?",
        "What object is in the {region} of the image?",
        "What can you see in the {region} corner?",
    ),
    ("naming", "alone"): (
        "What is in the picture?",
        "What is the object in the image?",
        "What is shown in this picture?",
    ),
    ("naming", "sized"): (
        "What {size} object is in the {region} of the picture?",
        "What is the {size} thing in the {region} of the image?",
        "What {size} object can you see in the {region} corner?",
    ),
    ("parts", "shape"): ("What shape is on the {name}?", "Which shape is drawn on the {name}?"),
    ("parts", "color"): (
        "What color is the {shape} on the {name}?",
        "What is the color of the {shape} on the {name}?",
    ),
    ("color", "open"): (
        "What color is the {name}?",
        "What is the color of the {name} in the image?",
        "Which color does the {name} have?",
    ),
    ("color", "group"): ("What color are the {names}?", "What is the color of the {names} in the image?"),
    ("color", "yesno"): ("Is the {name} {color}?", "Is there a {color} {name} in the image?"),
    ("counting", "open"): (
        "How many {names} are there in the picture?",
        "How many {names} are in the image?",
        "How many {names} can you see?",
    ),
    ("counting", "yesno"): (
        "Are there a total of {number} {names} in the image?",
        "Are there {number} {names} in the picture?",
    ),
    ("counting", "one"): (
        "Is there only one {name} in the image?",
        "Is there just one {name} in the picture?",
    ),
    ("position", "open"): (
        "Where is the {name} in the picture?",
        "In which corner of the image is the {name}?",
        "Where in the image is the {name}?",
    ),
    ("position", "yesno"): (
        "Is the {name} in the {region} of the image?",
        "Is the {name} {side} the {other} in the image?",
    ),
    ("words", "open"): (
        "What word is written in the picture?",
        "What does the text in the image say?",
        "What is the word in the image?",
    ),
    ("words", "yesno"): ('Is the word in the image "{text}"?', 'Does the text in the picture say "{text}"?'),
    ("caption", "open"): ("Describe the picture.", "What objects are in the picture?", "What do you see?"),
}


@dataclass(frozen=True)
class Question:
    """One question about one scene. `about`: the class or region asked for; `mentions`: classes it names."""

    type: str
    form: str  # "open", "yesno" or "choice"
    text: str  # without the image tag, with the prompt for a short answer
    answer: str
    choices: tuple[str, ...] = ()  # option texts in the order of their letters
    about: str = ""
    mentions: tuple[str, ...] = ()


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _form(rng: np.random.Generator) -> str:
    return str(rng.choice(["open", "yesno", "choice"], p=[0.74, 0.13, 0.13]))


def alternatives(kind: str, scene) -> list[str]:
    """Everything an open question of a type may be answered with, but for what else is in the scene."""
    if kind in ("naming", "small"):
        here = {thing.name for thing in scene.objects}
        return [name for name in drawings() if name not in here]
    return {
        "color": list(COLORS),
        "counting": [str(number) for number in numbers(scene)],
        "position": list(REGIONS),
        "words": list(WORDS),
        "parts": list(SHAPES),
    }[kind]


def numbers(scene) -> list[int]:
    """How many things of a class there may be in a scene."""
    return list(NUMBERS) if scene.dense else list(NUMBERS)[:4]


def options_for(rng: np.random.Generator, kind: str, scene, right: str) -> tuple[str, ...]:
    """The right answer at a uniform place among three wrong ones."""
    wrong = [str(o) for o in rng.permutation([o for o in alternatives(kind, scene) if o != right])[:3]]
    place = int(rng.integers(len(wrong) + 1))
    return (*wrong[:place], right, *wrong[place:])


def _asked(
    rng, kind: str, form: str, scene, text: str, right: str, about: str, mentions: tuple[str, ...] = ()
) -> Question:
    """A question to be answered in a word, or with `form` "choice" by the letter of one of four options."""
    if form != "choice":
        return Question(kind, "open", text + SHORT, right, (), about, mentions)
    options = options_for(rng, kind, scene, right)
    listing = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    letter = LETTERS[options.index(right)]
    return Question(kind, "choice", text + listing + LETTER, letter, options, about, mentions)


def _claim(rng: np.random.Generator, right: T, options: Iterable[T]) -> tuple[bool, T]:
    """(True, the right option) or (False, a wrong one), each half of the time."""
    if rng.random() < 0.5:
        return True, right
    return False, _pick(rng, [option for option in options if option != right])


def _yes(flag: bool) -> str:
    return "Yes" if flag else "No"


def presence(rng, scene, coins: Sequence[bool]) -> list[Question]:
    """One question per coin: about a class in the scene (True) or about one that is absent (False)."""
    weights = class_weights()
    here = list(rng.permutation(sorted({o.name for o in scene.things})))
    absent = [name for name in weights if name not in {o.name for o in scene.objects}]
    odds = np.array([weights[name] for name in absent])
    gone = list(rng.choice(absent, len(coins), replace=False, p=odds / odds.sum()))
    questions = []
    for coin in coins:
        name = str((here if coin else gone).pop())
        text = _pick(rng, TEMPLATES["presence", "yesno"]).format(a_name=article(name))
        questions.append(Question("presence", "yesno", text + SHORT, _yes(coin), (), name, (name,)))
    return questions


def class_weights() -> dict[str, float]:
    """How often a class is drawn, relatively: those that take a colour twice as often as the others."""
    return {name: 2.0 if name in colored_classes() else 1.0 for name in drawings()}


def naming(rng, scene) -> list[Question]:
    """What is in a region; in a scene of one object, what that is; in a dense one, what of one size is there,
    where that is of one class."""
    alone = len(scene.objects) == 1
    questions = []
    shown: dict[tuple[str, str | None], set[str]] = {}
    for thing in scene.things:
        shown.setdefault((thing.region, thing.size), set()).add(thing.name)
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[index]
        if len(shown.pop((thing.region, thing.size), ())) != 1:  # several classes, or asked already
            continue
        template = "sized" if scene.dense else "alone" if alone and rng.random() < 0.7 else "open"
        text = _pick(rng, TEMPLATES["naming", template]).format(region=thing.region, size=thing.size)
        about = "" if template == "alone" else thing.region
        form = "open" if rng.random() < 0.85 else "choice"
        kind = "small" if thing.size == "small" else "naming"
        questions.append(_asked(rng, kind, form, scene, text, thing.name, about, (thing.name,)))
    return questions


def color(rng, scene) -> list[Question]:
    """The colour of each class that has one (objects of one class share it)."""
    questions = []
    for name in sorted({o.name for o in scene.things if o.color}):
        group = [o for o in scene.objects if o.name == name]
        right, form = group[0].color, _form(rng)
        if form == "yesno" and len(group) == 1:
            truth, said = _claim(rng, right, COLORS)
            text = _pick(rng, TEMPLATES["color", "yesno"]).format(name=name, color=said)
            text = text.replace("a orange", "an orange")
            questions.append(Question("color", "yesno", text + SHORT, _yes(truth), (), name, (name,)))
            continue
        template = TEMPLATES["color", "open" if len(group) == 1 else "group"]
        text = _pick(rng, template).format(name=name, names=plural(name))
        questions.append(_asked(rng, "color", form, scene, text, right, name, (name,)))
    return questions


def counting(rng, scene) -> list[Question]:
    """How many there are of the class that the scene was laid out to count, if any; in a dense scene also of
    each other class with several things."""
    names = [scene.counted] if scene.counted else []
    if scene.dense:
        names += sorted({o.name for o in scene.things} - {o.name for o in scene.single} - set(names))
    questions = []
    for name in names:
        right, form = sum(o.name == name for o in scene.objects), _form(rng)
        if form == "yesno":
            truth, said = _claim(rng, right, numbers(scene))
            template = TEMPLATES["counting", "one" if said == 1 else "yesno"]
            text = _pick(rng, template).format(number=NUMBERS[said], name=name, names=plural(name))
            questions.append(Question("counting", "yesno", text + SHORT, _yes(truth), (), name, (name,)))
            continue
        text = _pick(rng, TEMPLATES["counting", "open"]).format(names=plural(name))
        questions.append(_asked(rng, "counting", form, scene, text, str(right), name, (name,)))
    return questions


def position(rng, scene) -> list[Question]:
    """Where things are of which there is only one."""
    questions = []
    for index in rng.permutation(len(scene.single)):
        thing, form = scene.single[index], _form(rng)
        if form == "yesno":
            questions.append(_position_yesno(rng, thing, [o for o in scene.single if o is not thing]))
            continue
        text = _pick(rng, TEMPLATES["position", "open"]).format(name=thing.name)
        questions.append(_asked(rng, "position", form, scene, text, thing.region, thing.name, (thing.name,)))
    return questions


def _position_yesno(rng, thing, others) -> Question:
    """Is it in that corner; or, where another thing stands in the other half, on that side of it."""
    truth = bool(rng.random() < 0.5)
    across = [o for o in others if o.region.split()[1] != thing.region.split()[1]]
    if across and rng.random() < 0.5:
        other = across[rng.integers(len(across))]
        left = thing.region.endswith("left") == truth
        side = "on the left of" if left else "on the right of"
        text = TEMPLATES["position", "yesno"][1].format(name=thing.name, side=side, other=other.name)
        mentions: tuple[str, ...] = (thing.name, other.name)
    else:
        said = thing.region if truth else _pick(rng, [r for r in REGIONS if r != thing.region])
        text = TEMPLATES["position", "yesno"][0].format(name=thing.name, region=said)
        mentions = (thing.name,)
    return Question("position", "yesno", text + SHORT, _yes(truth), (), thing.name, mentions)


def words(rng, scene) -> list[Question]:
    """What the rendered word says, if there is one."""
    right = scene.word
    if right is None:
        return []
    form = _form(rng)
    if form == "yesno":
        truth, said = _claim(rng, right, WORDS)
        text = _pick(rng, TEMPLATES["words", "yesno"]).format(text=said)
        return [Question("words", "yesno", text + SHORT, _yes(truth), (), "word")]
    text = _pick(rng, TEMPLATES["words", "open"])
    if form != "choice" and rng.random() < 0.25:
        text += NO_OCR_TOKENS
    return [_asked(rng, "words", form, scene, text, right, "word")]


def parts(rng, scene) -> list[Question]:
    """Of each mark its shape or its colour: asking the colour names the shape."""
    questions = []
    for mark in (thing for thing in scene.objects if thing.on):
        form = "open" if rng.random() < 0.85 else "choice"
        kind, right = ("parts", mark.name) if rng.random() < 0.5 else ("color", mark.color)
        template = TEMPLATES["parts", "shape" if kind == "parts" else "color"]
        text = _pick(rng, template).format(name=mark.on, shape=mark.name)
        asked = _asked(rng, kind, form, scene, text, right, mark.on, (mark.on,))
        questions.append(replace(asked, type="parts"))
    return questions


def caption(rng, scene) -> Question:
    """All things in reading order, as one short sentence without verb: "A red star, two dogs and a cat."."""
    parts, seen = [], set()
    for thing in sorted(scene.objects, key=lambda o: REGIONS.index(o.region)):
        if thing.name in seen or thing.on:
            continue
        seen.add(thing.name)
        count = sum(o.name == thing.name for o in scene.objects)
        tone = f"{thing.color} " if thing.color else ""
        if thing.written:
            parts.append(f'the word "{thing.name}"')
        else:
            many = f"{NUMBERS[count]} {tone}{plural(thing.name)}"
            parts.append(many if count > 1 else article(tone + thing.name))
    sentence = (", ".join(parts[:-1]) + " and " if parts[1:] else "") + parts[-1] + "."
    text = _pick(rng, TEMPLATES["caption", "open"])
    return Question("caption", "open", text, sentence[0].upper() + sentence[1:])


def ask(rng: np.random.Generator, scene, coins: Sequence[bool]) -> list[Question]:
    """All questions of a scene, type by type. `coins` are the answers of its presence questions."""
    return [
        *presence(rng, scene, coins),
        *naming(rng, scene),
        *color(rng, scene),
        *counting(rng, scene),
        *position(rng, scene),
        *words(rng, scene),
        *parts(rng, scene),
    ]


def converse(
    rng: np.random.Generator, questions: Sequence[Question], names_first: bool = False
) -> list[Question]:
    """The turns of a training conversation in random order, without those that earlier turns give away.

    Presence comes first (in 70 % of the scenes) or not at all: later, the other questions would have named
    what is there. Naming is left out once its class was mentioned, position once its region was.

    Args:
        names_first: naming comes before what mentions the same classes, and presence in half of the scenes
            only (edition 2): four times as many names are asked for.
    """
    share = 0.5 if names_first else 0.7
    first = [q for q in questions if q.type == "presence"] if rng.random() < share else []
    rest = [q for q in questions if q.type != "presence"]
    ordered = [first[i] for i in rng.permutation(len(first))] + [rest[i] for i in rng.permutation(len(rest))]
    if names_first:
        ordered.sort(key=lambda q: {"presence": 0, "naming": 1, "small": 1}.get(q.type, 2))
    turns: list[Question] = []
    mentioned: set[str] = set()
    for question in ordered:
        known = question.type in ("naming", "small") and mentioned.intersection(question.mentions)
        # "What is in the top left?" has been answered with this class: its place is known.
        placed = question.type == "position" and any(
            q.type in ("naming", "small") and q.about and question.about in q.mentions for q in turns
        )
        if known or placed:
            continue
        turns.append(question)
        mentioned.update(question.mentions)
    return turns
