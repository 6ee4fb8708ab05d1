"""Composed scenes as the six sets that `llava mini benchmarks` writes, each in its official file format."""

import base64
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, count, islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava.eval.benchmarks import mmbench, mme, pope, scienceqa
from llava.eval.benchmarks.base import SHORT
from llava.eval.reading import jsonl
from llava.files import write_text
from llava.mini import world
from llava.mini.questions import (
    LETTERS,
    NO_OCR_TOKENS,
    NUMBERS,
    TEMPLATES,
    Question,
    alternatives,
    article,
    numbers,
    options_for,
)
from llava.mini.sprites import COLORS, WORDS, drawings, plural

APART = 1_000_000
"""Each benchmark draws from its own range of scenes; `llava mini world` stays below the first."""
TEST_DEV_SHARE = 0.8  # of VQAv2's test2015 list


@dataclass
class Source:
    """The scenes of one benchmark in order, drawn into files below `root`.

    Attributes:
        first: index of the first scene.
        shown: what each picture shows, by its path relative to the root; grows with every picture drawn.
        bar: counts the pictures.
    """

    root: Path
    seed: int
    first: int
    shown: dict[str, world.Scene]
    bar: tqdm

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.seed, self.first])
        self.world = world.World("test", self.seed)

    def scenes(self, fit: Callable[[world.Scene], bool] = lambda scene: True) -> Iterator[world.Scene]:
        """Plans of scenes that fit, without end."""
        return (s for i in count(self.first) if fit(s := world.plan(self.world, i)))

    def draw(self, scene: world.Scene, path: str) -> Image.Image:
        """The scene as the picture that is to be called `path`."""
        picture, self.shown[path] = world.render(scene, self.world)
        self.bar.update()
        return picture

    def save(self, scene: world.Scene, path: str) -> None:
        """Draws the scene into the file `path`."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        self.draw(scene, path).save(file, quality=90)

    def questions(self, scene: world.Scene) -> list[Question]:
        return world.interview(self.world, scene)[0]


def _classes(scene: world.Scene) -> list[str]:
    return sorted({thing.name for thing in scene.things})


# --- POPE ---


def write_pope(source: Source, number: int) -> None:
    folder, rng = source.root / "pope", source.rng
    scenes = list(islice(source.scenes(lambda scene: len(_classes(scene)) >= 3), number))
    frequent = Counter(name for scene in scenes for name in _classes(scene))
    together = Counter(pair for scene in scenes for pair in combinations(_classes(scene), 2))

    labels: dict[str, list[dict]] = {category: [] for category in ("adversarial", "popular", "random")}
    for place, scene in enumerate(scenes):
        image = f"COCO_val2014_{place + 1:012d}.jpg"
        source.save(scene, f"pope/val2014/{image}")
        present = [str(name) for name in rng.permutation(_classes(scene))[:3]]
        absent = [str(name) for name in rng.permutation([n for n in drawings() if n not in _classes(scene)])]
        seen_with = {a: sum(together[min(a, p), max(a, p)] for p in _classes(scene)) for a in absent}
        negatives = {
            "random": absent[:3],
            "popular": sorted(absent, key=lambda name: -frequent[name])[:3],
            "adversarial": sorted(absent, key=lambda name: (-seen_with[name], -frequent[name]))[:3],
        }
        for category, rows in labels.items():
            for yes, no in zip(present, negatives[category], strict=True):
                for name, label in ((yes, "yes"), (no, "no")):
                    text = f"Is there {article(name)} in the image?"
                    rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": label})
    for category, rows in labels.items():
        write_text(folder / "coco" / f"coco_pope_{category}.json", jsonl(rows))
    write_text(folder / pope.QUESTIONS, pope.rebuild(source.root))


# --- MME ---

Pair = tuple[str, str]
"""A question whose answer is yes, and one whose answer is no."""


def _existence(rng: np.random.Generator, scene: world.Scene) -> Pair:
    here, gone = str(rng.choice(_classes(scene))), str(rng.choice(alternatives("naming", scene)))
    return f"Is there {article(here)} in this image?", f"Is there {article(gone)} in this image?"


def _count(rng: np.random.Generator, scene: world.Scene) -> Pair:
    right = sum(thing.name == scene.counted for thing in scene.objects)
    wrong = int(rng.choice([number for number in numbers(scene) if number != right]))

    def ask(number: int) -> str:
        if number == 1:
            return f"Is there only one {scene.counted} in the image?"
        return f"Are there a total of {NUMBERS[number]} {plural(scene.counted)} in the image?"

    return ask(right), ask(wrong)


def _sides(scene: world.Scene) -> list[tuple[world.Thing, world.Thing]]:
    """(left one, right one) of all single things in opposite halves."""
    left = [thing for thing in scene.single if thing.region.endswith("left")]
    right = [thing for thing in scene.single if thing.region.endswith("right")]
    return [(a, b) for a in left for b in right]


def _position(rng: np.random.Generator, scene: world.Scene) -> Pair:
    sides = _sides(scene)
    left, right = sides[rng.integers(len(sides))]
    names = {"left": (left.name, right.name), "right": (right.name, left.name)}
    true, false = rng.permutation(["left", "right"])
    subject, other = names[true]
    ask = f"Is the {subject} on the {{}} of the {other} in the image?"
    return ask.format(true), ask.format(false)


def _color(rng: np.random.Generator, scene: world.Scene) -> Pair:
    colored = [thing for thing in scene.single if thing.color]
    thing = colored[rng.integers(len(colored))]
    wrong = str(rng.choice([color for color in COLORS if color != thing.color]))

    def ask(color: str) -> str:
        return f"Is there {article(color)} {thing.name} in the image?"

    return ask(thing.color), ask(wrong)


def _ocr(rng: np.random.Generator, scene: world.Scene) -> Pair:
    wrong = str(rng.choice([word for word in WORDS if word != scene.word]))
    return f'Is the word in the image "{scene.word}"?', f'Is the word in the image "{wrong}"?'


SUBTASKS: dict[str, tuple[Callable[..., Pair], Callable[[world.Scene], bool]]] = {
    "existence": (_existence, lambda scene: True),
    "count": (_count, lambda scene: scene.counted is not None),
    "position": (_position, lambda scene: bool(_sides(scene))),
    "color": (_color, lambda scene: any(thing.color for thing in scene.single)),
    "OCR": (_ocr, lambda scene: scene.word is not None),
}


def write_mme(source: Source, number: int) -> None:
    root = source.root
    for offset, (subtask, (ask, fit)) in enumerate(SUBTASKS.items()):
        part = replace(source, first=source.first + offset * (APART // len(SUBTASKS)))
        for place, scene in enumerate(islice(part.scenes(fit), number)):
            stem = f"{mme.RELEASE}/{subtask}/{place + 1:06d}"
            part.save(scene, f"{stem}.jpg")
            yes, no = ask(part.rng, scene)
            write_text(root / f"{stem}.txt", f"{yes} {mme.ASK}\tYes\n{no} {mme.ASK}\tNo\n")
    write_text(root / mme.QUESTIONS, mme.rebuild(root))


# --- TextVQA ---


def write_textvqa(source: Source, number: int) -> None:
    folder, data, rows = source.root / "textvqa", [], []
    for place, scene in enumerate(islice(source.scenes(lambda scene: scene.word is not None), number)):
        image_id = hashlib.sha256(f"{source.seed}/{scene.index}".encode()).hexdigest()[:16]
        image = f"{image_id}.jpg"
        source.save(scene, f"textvqa/train_images/{image}")
        question = str(source.rng.choice(TEMPLATES["words", "open"]))
        data.append(
            {
                "question": question,
                "image_id": image_id,
                "answers": [scene.word] * 10,
                "question_id": place + 1,
                "image_classes": _classes(scene),
                "image_width": world.SIZE,
                "image_height": world.SIZE,
                "set_name": "val",
            }
        )
        text = question + NO_OCR_TOKENS + SHORT
        rows.append({"question_id": image_id, "image": image, "text": text, "category": "default"})
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "mini"}
    write_text(folder / "TextVQA_0.5.1_val.json", json.dumps({**head, "data": data}))
    write_text(folder / "llava_textvqa_val_v051_ocr.jsonl", jsonl(rows))


# --- VQAv2 ---


def write_vqav2(source: Source, number: int) -> None:
    folder, rng = source.root / "vqav2", source.rng
    rows, questions, annotations = [], [], []
    for place, scene in enumerate(islice(source.scenes(), number)):
        image_id = place + 1
        image = f"COCO_test2015_{image_id:012d}.jpg"
        source.save(scene, f"vqav2/test2015/{image}")
        asked = [q for q in source.questions(scene) if q.form != "choice" and q.type != "words"]
        for turn, index in enumerate(rng.permutation(len(asked))[:3]):
            question = asked[index]
            text, answer = question.text.removesuffix(SHORT), question.answer.lower()
            key = {"image_id": image_id, "question_id": image_id * 1000 + turn}
            row = {"question_id": key["question_id"], "image": image, "text": text + SHORT}
            rows.append({**row, "category": "default"})
            questions.append({**key, "question": text})
            kind = "number" if answer.isdigit() else "other"
            annotations.append(
                {
                    **key,
                    "question_type": " ".join(text.lower().split()[:3]),
                    "answer_type": "yes/no" if question.form == "yesno" else kind,
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer_id": i, "answer": answer, "answer_confidence": "yes"} for i in range(1, 11)
                    ],
                }
            )
    head = {
        "info": {"description": "composed scenes", "version": "mini"},
        "task_type": "Open-Ended",
        "data_type": "composed",
        "data_subtype": "mini",
        "license": {"name": "SIL OFL 1.1 (drawings)"},
    }
    write_text(
        folder / "v2_OpenEnded_composed_mini_questions.json", json.dumps({**head, "questions": questions})
    )
    write_text(folder / "v2_composed_mini_annotations.json", json.dumps({**head, "annotations": annotations}))
    # As with the real sets: test-dev is asked, test2015 holds more and is what an upload lists.
    test_dev = rows[: max(1, round(TEST_DEV_SHARE * len(rows)))]
    write_text(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", jsonl(test_dev))
    write_text(folder / "llava_vqav2_mscoco_test2015.jsonl", jsonl(rows))


# --- ScienceQA and MMBench: multiple choice ---


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question about a scene."""

    type: str
    question: str
    options: tuple[str, ...]
    right: int  # place of the right one

    def turned(self, steps: int) -> "Choice":
        """Options rotated to the right by `steps`."""
        cut = -steps % len(self.options)
        options = self.options[cut:] + self.options[:cut]
        return replace(self, options=options, right=(self.right + steps) % len(options))


def _choices(source: Source, scene: world.Scene) -> list[Choice]:
    """All open questions of a scene, with options."""
    choices = []
    for question in source.questions(scene):
        if question.form == "open":
            options = options_for(source.rng, question.type, scene, question.answer)
            text = question.text.removesuffix(SHORT).removesuffix(NO_OCR_TOKENS)
            choices.append(Choice(question.type, text, options, options.index(question.answer)))
    return choices


def _one_each(source: Source, number: int) -> Iterator[tuple[world.Scene, Choice]]:
    """`number` scenes with one question each, the types in turn, every letter equally often right."""
    order = ("naming", "color", "counting", "position", "words")
    scenes = source.scenes()
    for place in range(number):
        wanted = order[place % len(order)]
        for scene in scenes:
            fitting = [choice for choice in _choices(source, scene) if choice.type == wanted]
            if fitting:
                if place % len(LETTERS) == 0:
                    letters = source.rng.permutation(len(LETTERS))
                choice = fitting[source.rng.integers(len(fitting))]
                yield scene, choice.turned(int(letters[place % len(LETTERS)]) - choice.right)
                break


KINDS = {
    "animal": ("bear", "bird", "cat", "cow", "dog", "elephant", "fish", "frog", "horse", "lion", "pig"),
    "fruit": ("apple", "banana"),
    "vehicle": ("bike", "boat", "bus", "car", "plane", "train"),
    "shape": ("circle", "heart", "square", "star", "triangle"),
}


def _text_question(rng: np.random.Generator) -> Choice:
    """A question that needs no picture."""
    kind = str(rng.choice(list(KINDS)))
    right = str(rng.choice(KINDS[kind]))
    others = [name for other, names in KINDS.items() if other != kind for name in names]
    wrong = [str(name) for name in rng.choice(others, 3, replace=False)]
    place = int(rng.integers(4))
    return Choice(
        "kind", f"Which of these is {article(kind)}?", (*wrong[:place], right, *wrong[place:]), place
    )


def write_scienceqa(source: Source, number: int) -> None:
    folder, rng = source.root / "scienceqa", source.rng
    problems: dict[str, dict] = {}

    def add(choice: Choice, picture: bool, hint: str = "") -> str:
        identifier = str(len(problems) + 1)
        problems[identifier] = {
            "question": choice.question,
            "choices": list(choice.options),
            "answer": choice.right,
            "hint": hint,
            "image": "image.png" if picture else None,
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science" if picture else "language science",
            "topic": "composed scenes",
            "category": choice.type,
            "skill": choice.type,
            "lecture": "",
            "solution": "",
            "split": "test",
        }
        return identifier

    for place, (scene, choice) in enumerate(_one_each(source, number)):
        hint = "Look at the picture." if rng.random() < 0.25 else ""
        identifier = add(choice, True, hint)
        source.save(scene, f"scienceqa/images/test/{identifier}/image.png")
        if place % 3 == 2:
            add(_text_question(rng), False)
    splits: dict[str, list[str]] = {name: [] for name in ("train", "val", "trainval", "minitrain", "minival")}
    write_text(folder / "problems.json", json.dumps(problems, indent=1))
    write_text(
        folder / "pid_splits.json", json.dumps({**splits, "test": list(problems), "minitest": list(problems)})
    )
    write_text(folder / scienceqa.QUESTIONS, scienceqa.rebuild(source.root))


ABILITIES = {  # type of question -> MMBench's category and l2-category
    "naming": ("object_localization", "finegrained_perception (instance-level)"),
    "counting": ("object_localization", "finegrained_perception (instance-level)"),
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "words": ("ocr", "finegrained_perception (instance-level)"),
    "position": ("spatial_relationship", "finegrained_perception (cross-instance)"),
}
COLUMNS = (
    *("index", "question", "hint", *LETTERS, "answer"),
    *("category", "image", "source", "l2-category", "comment", "split"),
)


def write_mmbench(source: Source, number: int) -> None:
    base: list[tuple[Choice, str]] = []
    for scene, choice in _one_each(source, number):
        stream = io.BytesIO()
        source.draw(scene, f"mmbench/{len(base)}").save(stream, "JPEG", quality=90)
        base.append((choice, base64.b64encode(stream.getvalue()).decode()))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
    table.writeheader()
    for turn in range(len(LETTERS)):
        for place, (first, image) in enumerate(base):
            choice = first.turned(turn)
            category, l2_category = ABILITIES[choice.type]
            cells = {
                "index": str(turn * 1_000_000 + place),
                "question": choice.question,
                **dict(zip(LETTERS, choice.options, strict=True)),
                "answer": LETTERS[choice.right],
                "category": category,
                "image": image,
                "source": "composed",
                "l2-category": l2_category,
                "split": "dev",
            }
            table.writerow(cells)
    write_text(source.root / mmbench.EN, text.getvalue())
