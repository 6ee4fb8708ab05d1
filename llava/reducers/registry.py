"""Reducers by name: the base class, the registry, and the spec strings users write ("prumerge(ratio=0.125)").

A spec is `name` or `name(option=value, ...)`; spaces do not matter. Options are the fields of the method's
dataclass: their types and ranges are read from there, so a new method needs no parser of its own.

Methods of others are found in two ways: an installed package names them in its entry-point group
`llava.reducers` (name = module, which registers it), and `path/to/file.py:name` is a method that this file
registers.
"""

import difflib
import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import torch

from llava.reducers.features import TEXT_FIELDS, ReducedTokens, VisionFeatures


class ReducerSpecError(ValueError):
    """A spec that names no known method, or an option it does not have, or a value out of range."""


class ReducerInputError(ValueError):
    """Features a method cannot reduce: NaN or infinite values, or a part missing that it reads."""


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field with a range: low <= value <= high, or low < value if `open_low`; or of `choices`."""
    limits = {"low": low, "high": high, "open_low": open_low, "choices": tuple(choices)}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Reducer:
    """A method and its options: calling it turns `VisionFeatures` into `ReducedTokens`.

    Subclasses are frozen dataclasses, so two reducers with the same options are equal, and hold no state.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    """The optional fields of VisionFeatures that the method needs; nobody computes the others for it."""

    @property
    def asks(self) -> tuple[str, ...]:
        """What a tower is asked for: the fields in `reads`, and those that are read where they exist."""
        return self.reads

    @property
    def reads_question(self) -> bool:
        """Whether what it keeps depends on the question: then an image is encoded once for each question."""
        return not set(TEXT_FIELDS).isdisjoint(self.reads)

    def __post_init__(self) -> None:
        """Checks every option against its type and range, however the reducer was made.

        Raises:
            ReducerSpecError: a value of the wrong type or out of range.
        """
        for f in fields(self):
            _check(self, f.name, getattr(self, f.name), *_option_type(type(self), f.name), f.metadata)

    @property
    def spec(self) -> str:
        """The canonical spec: every option that is set, in order; `build_reducer(r.spec) == r`."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        kinds = {f.name: _option_type(type(self), f.name)[0] for f in fields(self)}
        text = ", ".join(
            f"{name}={_written(value, kinds[name])}" for name, value in given if value is not None
        )
        return f"{self.name}({text})" if text else self.name

    def __call__(self, features: VisionFeatures) -> ReducedTokens:
        """Reduces each image of the batch by itself, in the precision the method asks for, never autocast's.

        Raises:
            ReducerInputError: the method cannot reduce these features, or they lack what it reads.
        """
        if missing := [name for name in self.reads if getattr(features, name) is None]:
            remedy = "with a vision tower that has no CLS token, use pool, grid or random"
            if self.reads_question:
                remedy = "it needs the question, which llava chat, llava eval and llava.engine hand to it"
            raise ReducerInputError(
                f"reducer {self.name!r} reads {', '.join(missing)}, which is not there: {remedy}"
            )
        device = features.patches.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.reduce(features)
        return self.reduce(features)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        """What a method implements."""
        raise NotImplementedError


R = TypeVar("R", bound=type[Reducer])
_METHODS: dict[str, type[Reducer]] = {}


def register(name: str) -> Callable[[R], R]:
    """Class decorator: makes a reducer known under `name`.

    Raises:
        ValueError: the name is taken, or could not be written in a spec.
    """

    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a reducer's name: letters, digits, '_', '-' and '+' only")

    def decorate(cls: R) -> R:
        if name in _METHODS:
            raise ValueError(f"reducer {name!r} is already registered, by {_METHODS[name].__qualname__}")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return decorate


def available_reducers() -> list[str]:
    """The names of our methods in the order in which they were registered, then of installed packages'."""
    ours = (name for name in _METHODS if ":" not in name)
    return list(dict.fromkeys([*ours, *(point.name for point in entry_points(group=ENTRY_POINTS))]))


def build_reducer(spec: "str | Reducer | None", *, allow_files: bool = True) -> Reducer:
    """The reducer a spec describes. None means "none"; a reducer is returned as it is.

    Args:
        spec: what a user writes, or what a checkpoint's config records.
        allow_files: false: a spec that names a Python file is refused. For what comes from a checkpoint's
            config or a request to a server: neither may run code.

    Raises:
        ReducerSpecError: with what is wrong, the nearest name, and the names there are.
    """
    if isinstance(spec, Reducer):
        return spec
    if spec is None:
        spec = "none"
    if not isinstance(spec, str):
        raise ReducerSpecError(f"a reducer spec is a string such as 'prumerge+', not {spec!r}")
    name, given = _parse(spec)
    if not allow_files and ":" in name:
        raise ReducerSpecError(
            f"the reducer {spec!r} lies in a Python file, and checkpoints and requests run no code: pass "
            "that spec yourself (--reducer, reducer=) if you trust the file"
        )
    method = _find(name)
    known = [f.name for f in fields(method)]
    for key in given:
        if key not in known:
            there = _near(key, known) if known else "; it takes no options"
            raise ReducerSpecError(f"reducer {name!r} has no option {key!r}{there}")
    return method(**{key: _read(name, key, text, *_option_type(method, key)) for key, text in given.items()})


def _find(name: str) -> type[Reducer]:
    """The method called `name`: registered already, in the file it names, or of an installed package."""
    if name in _METHODS:
        return _METHODS[name]
    file, _, plain = name.rpartition(":")
    points = entry_points(group=ENTRY_POINTS, name=name)
    if file and not Path(file).expanduser().is_file():
        raise ReducerSpecError(f"there is no file {file}: write a reducer in a file as path/to/file.py:name")
    if not file and not points:
        raise ReducerSpecError(f"no reducer is called {name!r}{_near(name, available_reducers())}")
    before = set(_METHODS)
    try:
        if file:
            _run(Path(file).expanduser().resolve())
        for point in points:
            point.load()
    except Exception as error:  # whatever the code of others raises
        for half in _METHODS.keys() - before:
            del _METHODS[half]
        raise ReducerSpecError(
            f"cannot import the reducer {name!r}: {type(error).__name__}: {error}"
        ) from error
    new = _METHODS.keys() - before
    if plain not in new:
        where = file or points[name].value
        raise ReducerSpecError(f"{where} registers no reducer {plain!r}; it has {sorted(new)}")
    if file:
        # Known by its whole name, so that another process finds it by `reducer.spec`.
        for other in new:
            method = _METHODS.pop(other)
            method.name = f"{file}:{other}"
            _METHODS[method.name] = method
    return _METHODS[name]


def _run(file: Path) -> None:
    """Imports a Python file that belongs to no package."""
    module_name = f"llava_reducers_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)


ENTRY_POINTS = "llava.reducers"
"""The group in which installed packages name their reducers."""

_NAME = re.compile(r"[A-Za-z][\w+-]*")
_SPEC = re.compile(rf"\s*((?:[^()]+\.py:)?{_NAME.pattern})\s*(?:\((.*)\)\s*)?", re.DOTALL)
_WORD = re.compile(r"\w[\w.+-]*")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([^\s=](?:[^=]*[^\s=])?)\s*")


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    """'name(key=value, ...)' -> the name and the options as text."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ReducerSpecError(
            f"cannot read the reducer spec {spec!r}: write a name, or name(option=value, ...), "
            "for example prumerge(ratio=0.125)"
        )
    name, inside = match.groups()
    given: dict[str, str] = {}
    for part in inside.split(",") if inside and inside.strip() else []:
        pair = _OPTION.fullmatch(part)
        if pair is None:
            raise ReducerSpecError(
                f"cannot read {part.strip()!r} in the reducer spec {spec!r}: options are written option=value"
            )
        if pair[1] in given:
            raise ReducerSpecError(f"option {pair[1]!r} is given twice in the reducer spec {spec!r}")
        given[pair[1]] = pair[2]
    return name, given


def _near(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...? There are: ...' for an error about an unknown word."""
    names = list(known)
    near = " or ".join(map(repr, difflib.get_close_matches(word, names, n=2)))
    return (f"; did you mean {near}?" if near else ".") + f" There are: {', '.join(names)}"


def _option_type(method: type[Reducer], name: str) -> tuple[type, bool]:
    """The type of an option (int, float, bool or str), and whether it may be left unset (None)."""
    hint = get_type_hints(method)[name]
    types = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    return types[0], NoneType in get_args(hint)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
_TRUTH = {"true": True, "false": False}


def _read(method: str, name: str, text: str, kind: type, optional: bool) -> Any:
    """An option's text as its type; 'none' unsets an optional one."""
    if optional and text.lower() == "none":
        return None
    try:
        return _TRUTH[text.lower()] if kind is bool else text.strip("'\"") if kind is str else kind(text)
    except (KeyError, ValueError):
        message = f"reducer {method!r}: {name} is {_WORDS[kind]}, not {text!r}"
        raise ReducerSpecError(message) from None


def _written(value: Any, kind: type) -> str:
    """An option's value as a spec writes it; `_read` gives the same value back."""
    return str(value).lower() if kind is bool else repr(float(value)) if kind is float else str(value)


def _check(reducer: Reducer, name: str, value: Any, kind: type, optional: bool, limits: Any) -> None:
    """Refuses a value of the wrong type or outside its range."""
    if value is None and optional:
        return
    fits = type(value) is kind or (kind is float and type(value) is int)
    if (
        not fits
        or (kind is float and not math.isfinite(value))
        or (kind is str and not _WORD.fullmatch(value))
    ):
        raise ReducerSpecError(f"reducer {reducer.name!r}: {name} is {_WORDS[kind]}, not {value!r}")
    if limits.get("choices") and value not in limits["choices"]:
        known = ", ".join(limits["choices"])
        raise ReducerSpecError(f"reducer {reducer.name!r}: {name} is one of {known}, not {value!r}")
    low, high, open_low = limits.get("low"), limits.get("high"), limits.get("open_low", False)
    if low is not None and (value <= low if open_low else value < low):
        bound = "above" if open_low else "at least"
        raise ReducerSpecError(f"reducer {reducer.name!r}: {name} must be {bound} {low}, not {value}")
    if high is not None and value > high:
        raise ReducerSpecError(f"reducer {reducer.name!r}: {name} must be at most {high}, not {value}")
