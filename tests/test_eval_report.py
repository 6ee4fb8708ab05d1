"""The report: what is collected, where it stands in the tables, and what a page shows."""

import json
import os

import pytest

from llava import cli
from llava.eval import benchmarks, report


def provenance(folder, name, reducer, benchmark="pope", value=80.0, tokens=144.0, run=None, **more):
    content = {
        "run": {
            "benchmark": benchmark, "protocol": benchmarks.get(benchmark).protocols[0].name, "model": "mini",
            "weights": "abcdef0123456789", "reducer": reducer, "dtype": "float32",
        } | (run or {}),
        "summary": {
            "questions": 100, "answered": 100, "problems": [], "questions_per_second": 4.0,
            "visual_tokens": {"mean": tokens, "p50": tokens, "p95": tokens + 8, "max": 200},
        },
        "sessions": [{"device": "cpu"}],
        "score": {"headline": {"name": "f1", "value": value, "interval": [value - 1, value + 1.5]}},
    } | more  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.provenance.json").write_text(json.dumps(content))


def shown(axes):
    """{color: (x, y)} of the runs."""
    lines = [bars.lines[0] for bars in axes.containers]
    return {line.get_color(): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines}


def test_a_run_has_its_place_and_one_colour_in_every_plot(tmp_path):
    """Published scores stand beside runs of the whole set only."""
    for name in ("pope", "scienceqa"):
        whole = {"questions": 8910, "answered": 8910, "questions_per_second": 4.0}
        whole["visual_tokens"] = {"mean": 576}
        provenance(tmp_path, name, "none", name, 85.0, summary=whole)
        provenance(tmp_path, f"{name}+", "prumerge+", name, 84.0)
    figure = report.plot(report.collect([tmp_path]))
    pope, pope_time, science, _ = map(shown, figure.axes)
    assert sorted(pope.values()) == [(144, 84), (576, 85)] and set(pope) == set(science)
    assert set(pope_time.values()) == {(0.25, 84), (0.25, 85)}
    crosses = [[x.get_ydata()[0] for x in axes.lines if x.get_marker() == "x"] for axes in figure.axes]
    assert crosses == [list(benchmarks.get("pope").published), [], [], []]


@pytest.fixture
def runs(tmp_path):
    provenance(tmp_path / "pope", "a", "none", value=85.9, tokens=576)
    provenance(tmp_path / "pope", "b", "prumerge+", value=84.0)
    provenance(tmp_path / "sqa", "c", "prumerge+", "scienceqa", 68.3)
    provenance(tmp_path / "sqa", "d", "prumerge+", "scienceqa", 67.1, run={"protocol": "crop"})
    provenance(tmp_path, "unfinished", "none", summary=None)
    return tmp_path


def test_tables(runs):
    (_, header, scores), (_, _, took), (_, names, published) = report.tables(report.collect([runs]))
    assert header == ["model", "reducer", "dtype", "pope", "scienceqa", "scienceqa (crop)"]
    assert scores == [
        ["mini", "none", "float32", "85.9 (84.9 to 87.4)", "-", "-"],
        ["mini", "prumerge+", "float32", "84.0 (83.0 to 85.5)", "68.3 (67.3 to 69.8)", "67.1 (66.1 to 68.6)"],
    ]
    assert took[0][3] == "576.0 (584), 0.250 s"
    assert names == ["model", "tokens", "pope", "scienceqa"]
    assert ["LLaVA-1.5-7B", "576", "85.9", "66.8"] in published
    assert ["PruMerge+ 7B", "144", "84.0", "68.3"] in published


def test_a_run_of_a_part_says_so(tmp_path):
    provenance(tmp_path, "a", "none", score={"headline": {"value": 50.0, "interval": None}, "partial": True})
    assert report.tables(report.collect([tmp_path]))[0][2][0][3] == "50.0, a part: 100 questions"


def test_command_writes_page_and_numbers(runs, capsys):
    page, numbers = runs / "r.html", runs / "r.json"
    assert cli.main(["report", str(runs), "--html", str(page), "--json", str(numbers)]) == 0
    assert "| mini | none | float32 |" in capsys.readouterr().out
    assert page.read_text().count("<svg") == 1 and page.read_text().count("<tr>") > 15
    content = json.loads(numbers.read_text())
    assert {one["score"] for one in content["runs"]} == {85.9, 84.0, 68.3, 67.1}
    assert {one["name"]: one["scores"] for one in content["published"]}["LLaVA-1.5-7B"]["mm-vet"] == 31.1


def test_the_newest_of_equal_runs(tmp_path):
    provenance(tmp_path, "old", "none", value=1.0)
    provenance(tmp_path, "new", "none", value=2.0)
    provenance(tmp_path, "other", "none", value=3.0, run={"weights": "0123456789abcdef"})
    os.utime(tmp_path / "old.provenance.json", (1, 1))
    found = report.collect([tmp_path])
    assert sorted(one.score for one in found) == [2.0, 3.0]
    labels = [row[0] for row in report.tables(found)[0][2]]
    assert labels == ["mini (012345)", "mini (abcdef)"]  # one name, two sets of weights


def test_nothing_to_report(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no *.provenance.json" in capsys.readouterr().err
    (tmp_path / "x.provenance.json").write_text("{")
    assert cli.main(["report", str(tmp_path)]) == 2


def test_published_scores():
    """As the papers' tables have them, whatever a benchmark's tuple looks like."""
    by_name = {one["name"]: one for one in report.published()}
    assert set(by_name["LLaVA-1.5-7B"]["scores"]) == set(benchmarks.BENCHMARKS)
    assert by_name["LLaVA-1.5-13B"]["scores"]["seed"] == 61.6
    assert by_name["PruMerge 7B"]["visual_tokens"] == 32
    assert by_name["PruMerge 7B"]["scores"] == {
        "vqav2": 72.0, "scienceqa": 68.5, "textvqa": 56.0, "pope": 76.3, "mme": 1350.3, "mmbench": 60.9
    }  # fmt: skip
