"""Spec strings, the registry, and what docs/reducers.md promises about both."""

import re
from dataclasses import dataclass, fields

import pytest

from llava.reducers import ReducerSpecError, available_reducers, build_reducer, register
from llava.reducers.prumerge import PruMerge
from llava.reducers.registry import _METHODS, Reducer, option


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back afterwards."""
    before = dict(_METHODS)
    yield _METHODS
    _METHODS.clear()
    _METHODS.update(before)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("none", "none"),
        (None, "none"),
        ("prumerge", "prumerge"),
        ("prumerge+", "prumerge+"),
        (" prumerge+ ( ) ", "prumerge+"),
        ("prumerge(ratio=0.125)", "prumerge(ratio=0.125)"),
        ("prumerge( ratio = .125 )", "prumerge(ratio=0.125)"),
        ("prumerge(ratio=1)", "prumerge(ratio=1.0)"),
        ("prumerge(ratio=1e-3)", "prumerge(ratio=0.001)"),
        ("prumerge(ratio=none)", "prumerge"),
        ("prumerge+(max_tokens=144, min_tokens=8)", "prumerge+(min_tokens=8, max_tokens=144)"),
        ("topk(tokens=64)", "topk(tokens=64)"),
        ("topk", "topk(tokens=144)"),
        ("random(seed=7,\n tokens=32)", "random(tokens=32, seed=7)"),
    ],
)
def test_canonical(spec, canonical):
    reducer = build_reducer(spec)
    assert reducer.spec == canonical
    assert build_reducer(reducer.spec) == reducer
    assert build_reducer(reducer) is reducer


def test_python_numbers_round_trip():
    assert PruMerge(ratio=1).spec == "prumerge(ratio=1.0)"
    for ratio in (1 / 3, 1 / 17, 0.1 + 0.2):
        assert build_reducer(PruMerge(ratio=ratio).spec).ratio == ratio


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("prumrge", "'prumerge+'"),  # the nearest names
        ("prumerge_plus", "'prumerge+'"),
        ("xyz", "none, random"),  # the names there are
        ("prumerge(ration=0.1)", "'ratio'"),
        ("none(tokens=3)", "'tokens'"),
        ("prumerge(ratio=2)", "ratio"),
        ("prumerge(ratio=0)", "ratio"),
        ("prumerge(ratio=nan)", "ratio"),
        ("prumerge(ratio=half)", "'half'"),
        ("prumerge(merge=no)", "merge"),
        ("topk(tokens=0)", "tokens"),
        ("topk(tokens=-3)", "tokens"),
        ("topk(tokens=6.5)", "'6.5'"),
        ("topk(tokens=none)", "tokens"),
        ("topk(64)", "'64'"),
        ("topk(tokens=1,)", "''"),
        ("topk(tokens=)", "'tokens='"),
        ("topk(tokens=1, tokens=2)", "'tokens'"),
        ("topk(tokens=1", "topk(tokens=1"),
        ("topk)tokens=1(", "topk)"),
        ("topk(tokens=1) x", "topk"),
        ("", "''"),
        ("prumerge(tokens=3, ratio=0.5)", "tokens"),
        ("prumerge+(min_tokens=9, max_tokens=3)", "min_tokens"),
    ],
)
def test_refused(spec, named):
    with pytest.raises(ReducerSpecError) as error:
        build_reducer(spec)
    assert named in str(error.value)


def test_options_are_checked_in_python_too():
    for wrong in ({"ratio": 2.0}, {"ratio": "0.5"}, {"tokens": 3.0}, {"tokens": True}, {"max_tokens": 0}):
        with pytest.raises(ReducerSpecError):
            PruMerge(**wrong)
    with pytest.raises(ReducerSpecError):
        build_reducer(3)


def test_a_name_is_given_once(registry):
    with pytest.raises(ValueError, match="'prumerge'"):
        register("prumerge")(type("Other", (Reducer,), {}))
    with pytest.raises(ValueError, match="two words"):
        register("two words")
    assert available_reducers() == list(registry)


def test_every_option_type(registry):
    @register("typed")
    @dataclass(frozen=True)
    class Typed(Reducer):
        number: int = option(1, low=0, high=9)
        share: float = option(0.5)
        on: bool = False
        mode: str = "plain"
        maybe: int | None = None

    assert build_reducer("typed").spec == "typed(number=1, share=0.5, on=false, mode=plain)"
    reducer = build_reducer("typed(on=TRUE, mode='l2-norm', maybe=3, number=9)")
    assert reducer == Typed(number=9, on=True, mode="l2-norm", maybe=3)
    assert build_reducer(reducer.spec) == reducer
    for wrong in ("on=1", "on=yes", "mode=a b", "number=10", "number=1.0", "maybe=x", "share=inf"):
        with pytest.raises(ReducerSpecError):
            build_reducer(f"typed({wrong})")


def test_the_example_of_the_docs(root, registry):
    """The method docs/reducers.md adds in a few lines is run as it stands there."""
    from test_reducers import make_features

    text = (root / "docs" / "reducers.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@register" in code]
    exec(compile(example, "docs/reducers.md", "exec"), {"__name__": "example"})
    (name,) = [name for name in registry if f'"{name}"' in example]
    features = make_features(2)
    reduced = build_reducer(f"{name}(tokens=5)")(features)
    norms = features.patches.norm(dim=2)
    for image in range(2):
        kept = reduced.kept[image].tolist()
        assert sorted(kept) == sorted(norms[image].topk(5).indices.tolist())


def test_the_docs_name_every_method_and_option(root):
    text = (root / "docs" / "reducers.md").read_text(encoding="utf-8")
    for name in available_reducers():
        assert f"`{name}`" in text
        for key in [f.name for f in fields(_METHODS[name])]:
            assert f"`{key}`" in text
    for spec in re.findall(r"--reducer \"?([a-z+]+(?:\([^)]*\))?)", text):
        build_reducer(spec)
