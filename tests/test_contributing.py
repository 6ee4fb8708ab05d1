"""What CONTRIBUTING.md adds, added as it says, works like what is there: a reducer, a benchmark."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

USE = """
import json, torch
from llava.reducers import ReducerSpecError, VisionFeatures, available_reducers, build_reducer

def refusal(spec):
    try:
        build_reducer(spec)
    except ReducerSpecError as error:
        return str(error)

generator = torch.Generator().manual_seed(0)
patches = torch.randn(2, 12, 8, generator=generator)
features = VisionFeatures(patches, torch.randn(2, 8), torch.randn(2, 13, 8), num_heads=2, grid=(3, 4))
few, default = build_reducer("first(tokens=3)"), build_reducer("first")
reduced = few(features)
print(json.dumps({
    "last": available_reducers()[-1],
    "spec": [few.spec, default.spec],
    "kept": reduced.kept.tolist(),
    "source": reduced.source[0].tolist(),
    "same": [torch.equal(one, image[:3]) for one, image in zip(reduced.unbind(), patches)],
    "all": default(features).lengths.tolist(),
    "refused": [refusal("first(tokens=0)"), refusal("frist")],
}))
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_new_reducer(root, tmp_path):
    page = root / "CONTRIBUTING.md"
    code, *_ = blocks(page, "python")
    name = re.findall(r"say `(\w+)\.py`", page.read_text())[0]
    (line,) = re.findall(rf"`(from llava\.reducers import .*{name})`", page.read_text())

    package = shutil.copytree(root / "llava/reducers", tmp_path / "llava/reducers")
    shutil.copy(root / "llava/__init__.py", package.parent)
    (package / f"{name}.py").write_text(code)
    with (package / "__init__.py").open("a") as file:
        file.write(f"{line}\n")

    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["last"] == "first"
    assert said["spec"] == ["first(tokens=3)", "first(tokens=64)"]
    assert said["kept"] == [[0, 1, 2]] * 2
    assert said["source"] == [0, 1, 2] + [-1] * 9
    assert said["same"] == [True, True]
    assert said["all"] == [12, 12]
    too_few, misspelt = said["refused"]
    assert "at least 1" in too_few and "did you mean 'first'" in misspelt


def test_the_new_benchmark(root, tmp_path):
    page = root / "CONTRIBUTING.md"
    _, code, *_ = blocks(page, "python")
    *_, script = blocks(page, "bash")
    shutil.copytree(root / "llava", tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "scripts/v1_5", tmp_path / "scripts/v1_5")
    (tmp_path / "llava/eval/benchmarks/colors.py").write_text(code)
    (tmp_path / "scripts/v1_5/eval/colors.sh").write_text(script)
    words = {"1": "red", "2": "blue", "3": "green", "4": "red"}
    folder = tmp_path / "eval/colors"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(words))
    asked = [{"question_id": int(x), "image": f"{x}.jpg", "text": "Which color?"} for x in words]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    answered = [
        {"question_id": x, "text": text}
        for x, text in zip(words, ("Red.", "blue", "red", "red"), strict=True)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))

    def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], **more}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    def llava(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, "-m", "llava.cli", *arguments)

    done = llava("score", "colors", "--root", "eval", "--answers", "answers.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["metrics"] == {"accuracy": 75.0} and report["notes"] == []
    doctor = llava("doctor", "eval", "--root", "eval")
    assert (
        "ok colors/labels.json  4 rows" in doctor.stdout and "https://example.org/colors.zip" in doctor.stdout
    )
    table = "from llava.eval.report import published; print(published()[0]['scores']['colors'])"
    assert run(sys.executable, "-c", table).stdout == "71.5\n"
    (folder / "labels.json").write_text(json.dumps(words | {"2": ["blue"]}))
    refused = llava("score", "colors", "--root", "eval", "--answers", "answers.jsonl")
    assert refused.returncode == 2 and "eval/colors/labels.json" in refused.stderr
    dry = run("bash", "scripts/v1_5/eval/all.sh", DRY_RUN="1")
    assert "llava.cli eval colors" in dry.stderr
