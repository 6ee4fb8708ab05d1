"""docs/tour.ipynb runs from top to bottom, on fewer pictures and questions than a reader's."""

import json

import pytest
from conftest import ROOT


@pytest.mark.filterwarnings("ignore")
def test_the_tour_runs(mini, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
    fewer = {
        'glob("*.jpg"))': 'glob("scene*.jpg"))',
        "SCENES = 4": "SCENES = 1",
        "pope.load(folder)": "pope.load(folder)[:6]",
        "COUNTS = (16, 64, 144)": "COUNTS = (16,)",
    }
    text, names = "", {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            for whole, few in fewer.items():
                source = source.replace(whole, few)
            exec(compile(source, "docs/tour.ipynb", "exec"), names)
            text += source
    assert all(few in text for few in fewer.values())
    # What the last cells leave: reduced prompts of the plug, and a point for each method.
    assert (
        names["logits"].shape[1] == 30 + 33
        and type(names["model"]).__name__ == "LlavaForConditionalGeneration"
    )
    assert {name: points[0][0] for name, points in names["curves"].items()} == {
        "prumerge+": 17,
        "topk": 16,
        "random": 16,
    }
    assert names["everything"][0] == 576 and len(names["figure"].axes[0].lines) == 4
