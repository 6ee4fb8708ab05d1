"""Reducers that are not part of this package: of an installed package, and in a file the user names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.reducers import ReducerSpecError, VisionFeatures, build_reducer, registry

FIRST = """
from dataclasses import dataclass

import torch

from llava.reducers import Reducer, option, register
from llava.reducers.ops import pick


@register("first")
@dataclass(frozen=True)
class First(Reducer):
    tokens: int = option(2, low=1)

    def reduce(self, features):
        rows = torch.arange(self.tokens).repeat(len(features.patches), 1)
        return pick(features.patches, rows)
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def features() -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    patches, key = (torch.randn(2, length, 8, generator=generator) for length in (12, 13))
    return VisionFeatures(patches, torch.randn(2, 8, generator=generator), key, num_heads=2, grid=(3, 4))


def test_a_file_names_a_reducer_that_its_spec_finds_again(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FIRST)
    reducer = build_reducer(f"{file}:first(tokens=3)")
    reduced = reducer(features())
    assert reduced.kept.tolist() == [[0, 1, 2]] * 2
    assert build_reducer(reducer.spec) == reducer and str(file) in reducer.spec
    with pytest.raises(ReducerSpecError, match="tokens"):
        build_reducer(f"{file}:first(tokens=0)")
    with pytest.raises(ReducerSpecError, match="first"):
        build_reducer("first")  # known by its whole name only


def test_a_checkpoint_may_not_name_a_file(tmp_path):
    file = tmp_path / "evil.py"
    file.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n{FIRST}")
    with pytest.raises(ReducerSpecError, match="Python file"):
        build_reducer(f"{file}:first", allow_files=False)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "there is no file"),
        ("import does_not_exist", "does_not_exist"),
        ("def broken(:", "SyntaxError"),
        ("", "registers no reducer"),
        (FIRST.replace('"first"', '"topk"'), "topk"),
        (FIRST + "\nraise RuntimeError('half way')", "half way"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, named):
    file = tmp_path / "bad.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ReducerSpecError, match=named) as caught:
        build_reducer(f"{file}:first")
    assert "bad" in str(caught.value)
    assert build_reducer("topk").name == "topk"  # nothing that was there has changed


def test_an_installed_package_registers_by_entry_point(tmp_path):
    (tmp_path / "few_tokens.py").write_text(FIRST)
    (tmp_path / "broken_tokens.py").write_text("import does_not_exist")
    info = tmp_path / "few_tokens-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: few-tokens\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llava.reducers]\nfirst = few_tokens\nbroken = broken_tokens\n")
    code = """
import json
from llava.reducers import ReducerSpecError, available_reducers, build_reducer
try:
    build_reducer("broken")
except ReducerSpecError as error:
    refused = str(error)
try:
    build_reducer("frist")
except ReducerSpecError as error:
    near = str(error)
print(json.dumps([available_reducers(), build_reducer("first(tokens=3)").spec, refused, near]))
"""
    root = Path(__file__).resolve().parent.parent
    env = {"PYTHONPATH": f"{tmp_path}:{root}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    names, spec, refused, near = json.loads(done.stdout)
    assert {"first", "broken", "prumerge"} <= set(names) and spec == "first(tokens=3)"
    assert "does_not_exist" in refused and "'first'" in near
