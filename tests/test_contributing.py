"""CONTRIBUTING.md's new reducer, added as it says (one file, one line), is a reducer like any other."""

import json
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


def test_the_new_reducer(root: Path, tmp_path: Path) -> None:
    page = root / "CONTRIBUTING.md"
    (code,) = blocks(page, "python")
    (name,) = re.findall(r"say `(\w+)\.py`", page.read_text())
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
