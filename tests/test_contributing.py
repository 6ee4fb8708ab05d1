"""What CONTRIBUTING.md adds, added as it says, works like what is there: a reducer, a benchmark."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_reducers import check_contract, make_features

from llava import cli
from llava.eval import benchmarks, report
from llava.reducers import registry


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_new_reducer(root, tmp_path, monkeypatch):
    """Beside the code it is named by its file; the page's other line makes a plain name of that."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    page, file = root / "CONTRIBUTING.md", tmp_path / "first.py"
    assert "`from llava.reducers import first as first`" in page.read_text()
    file.write_text(blocks(page, "python")[0])
    for grid in ((24, 24), (3, 4), (1, 1)):
        length = grid[0] * grid[1]
        reduced = check_contract(f"{file}:first(tokens=3)", make_features(2, grid))
        assert reduced.kept.tolist() == [list(range(min(3, length)))] * 2
        assert (
            check_contract(f"{file}:first", make_features(2, grid)).lengths.tolist() == [min(64, length)] * 2
        )
    with pytest.raises(registry.ReducerSpecError, match="at least 1"):
        registry.build_reducer(f"{file}:first(tokens=0)")


def test_the_new_benchmark(root, tmp_path, monkeypatch, capsys):
    page = root / "CONTRIBUTING.md"
    tree = shutil.copytree(
        root / "llava", tmp_path / "tree/llava", ignore=shutil.ignore_patterns("__pycache__")
    )
    (code := tree / "eval/benchmarks/colors.py").write_text(blocks(page, "python")[1])
    spec = importlib.util.spec_from_file_location("llava.eval.benchmarks.colors", code)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "colors", module.BENCHMARK)

    words = {"1": "red", "2": "blue", "3": "green", "4": "red"}
    (folder := tmp_path / "eval/colors").mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(words))
    asked = [{"question_id": int(x), "image": f"{x}.jpg", "text": "Which color?"} for x in words]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    said = zip(words, ("Red.", "blue", "red", "red"), strict=True)
    rows = (json.dumps({"question_id": x, "text": text}) + "\n" for x, text in said)
    (answers := tmp_path / "answers.jsonl").write_text("".join(rows))

    score = ["score", "colors", "--root", str(tmp_path / "eval"), "--answers", str(answers), "--json"]
    found = subprocess.run([sys.executable, "-m", "llava.cli", *score], capture_output=True, cwd=tree.parent)
    result = json.loads(found.stdout)
    assert result["metrics"] == {"accuracy": 75.0} and result["notes"] == []
    assert cli.main(["doctor", "eval", "colors", "--root", str(tmp_path / "eval")]) == 1  # no images
    assert "https://example.org/colors.zip" in capsys.readouterr().out
    assert report.published()[0]["scores"]["colors"] == 71.5
    (folder / "labels.json").write_text(json.dumps(words | {"2": ["blue"]}))
    assert cli.main(score) == 2 and "colors/labels.json" in capsys.readouterr().err

    scripts = shutil.copytree(root / "scripts/v1_5", tmp_path / "scripts/v1_5") / "eval"
    (scripts / "colors.sh").write_text(blocks(page, "bash")[-1])
    command, env = ["bash", str(scripts / "all.sh")], os.environ | {"DRY_RUN": "1"}
    dry = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "llava.cli eval colors" in dry.stderr
