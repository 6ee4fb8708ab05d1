"""Answers of questions about composed scenes, worked out from the question's text and from what stands where:
the slow way, which shares nothing with the generator but the names of things.
"""

import re
from collections import Counter

from llava.mini import sprites
from llava.mini.questions import NUMBERS, REGIONS


def type_of(question: str) -> str:
    """Which type a question is of, by its words."""
    said = set(re.findall(r"\w+", question))
    if re.search(r"\b(is|drawn|\w+) on the (?!left|right)", question) and said & {"shape", "color"}:
        return "parts"
    if "small" in said:
        return "small"
    if said & {"word", "text"}:
        return "words"
    if "color" in said or said & set(sprites.COLORS):
        return "color"
    if question.startswith(("How many", "Are there")) or said & {"only", "just", "total"}:
        return "counting"
    if question.startswith("What"):
        return "naming"
    placed = re.search(r"on the \w+ of| in the \w+ \w+ of", question)
    return "position" if question.startswith(("Where", "In which")) or placed else "presence"


def named(question: str) -> list[str]:
    """Classes that a question names, in the order of their places."""
    found = {}
    for name in sprites.drawings():
        if match := re.search(rf"\b({name}|{sprites.plural(name)})\b", question):
            found[name] = match.start()
    return sorted(found, key=found.get)


def truth(question: str, scene) -> str:
    """What is right: "Yes", "No", or the word or phrase. `question` is one line, without frame."""
    if question.split()[0] in ("Is", "Are", "Can", "Does"):
        return "Yes" if _holds(question, scene) else "No"
    kind, names = type_of(question), named(question)
    if kind == "parts":
        host = question.rpartition(" on the ")[2].removesuffix("?")
        (mark,) = (thing for thing in scene.objects if thing.on == host)
        assert "shape" in question or mark.name in names
        return mark.name if "shape" in question else mark.color
    if kind == "words":
        return next(thing.name for thing in scene.objects if thing.written)
    if kind in ("naming", "small"):
        region = next((region for region in REGIONS if region in question), None)
        size = next((size for size in ("small", "large") if size in question), None)
        things = [t for t in scene.objects if not t.written and not t.on and region in (None, t.region)]
        (name,) = {thing.name for thing in things if size in (None, thing.size)}
        return name
    asked = [thing for thing in scene.objects if thing.name == names[0]]
    if kind == "counting":
        return str(len(asked))
    if kind == "color":
        return asked[0].color
    assert len(asked) == 1
    return asked[0].region


def _holds(question: str, scene) -> bool:
    kind, names = type_of(question), named(question)
    count = Counter(thing.name for thing in scene.objects if not thing.on)
    where = {thing.name: thing for thing in scene.objects}
    if kind == "words":
        return any(f'"{thing.name}"' in question for thing in scene.objects if thing.written)
    if kind == "presence":
        return count[names[0]] > 0
    if kind == "color":
        return re.search(rf"\b{where[names[0]].color}\b", question) is not None
    if kind == "counting":
        number = next((n for n, word in NUMBERS.items() if word in question.split()), 1)
        return count[names[0]] == number
    if len(names) == 2:
        x = [where[name].box[0] + where[name].box[2] for name in names]
        return (x[0] < x[1]) == ("on the left of" in question)
    return where[names[0]].region in question
