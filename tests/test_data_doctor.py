"""`llava doctor data`: one finding per flaw put in, none elsewhere."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_data import sample

from llava import cli
from llava.data import doctor

pytest.importorskip("datasets")

TOKENIZER = str(Path(__file__).parent / "data" / "text" / "tokenizers" / "tok_nonlegacy")


FLAWED: list[tuple[object, str | None, str]] = [
    # row, kind of finding, part of its reason
    (sample("<image>\nfine", "yes", id=0, image="a.png"), None, ""),
    (sample("fine", "too", id="1"), None, ""),
    (sample("<image> or <image>", "fine", image=["a.png", "b.png"]), None, ""),
    (sample("x", "dropped", "fine")["conversations"], "row", "object"),
    (sample("<image>", "x", image="gone.png"), "image", "gone.png: no such image file"),
    (sample("<image>", "y", image="torn.png"), "image", "torn.png is damaged"),
    (sample("<image>", "z", image="torn.png"), "image", "torn.png is damaged"),
    (
        sample("<image>", "x", "<image>", "x", image="a.png"),
        "image-count",
        "images: 1, <image> in its text: 2",
    ),
    (sample("none", "x", image="a.png"), "image-count", "images: 1"),
    (sample("<image>", "x"), "image-count", "images: 0"),
    (sample("a", "x", "b"), "turns", "does not end with an answer"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "turns",
        "turn 2 is from human",
    ),
    ({"conversations": [{"from": "system", "value": "a"}]}, "turns", "system"),
    (sample("a", " \n"), "empty", "turn 2, of gpt"),
    (sample("", "a"), "empty", "turn 1, of human"),
    (sample("a", "b </s> c"), "masked", "marker"),
    (sample("long " * 3000, "x"), "too-long", "are cut off"),
    ({"conversations": [{"from": "gpt", "value": "first"}, *sample("a", "b!")["conversations"]]}, None, ""),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 30), 50).save(tmp_path / name)
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "flawed.json").write_text(json.dumps([row for row, _, _ in FLAWED]))
    return tmp_path


def examine(capsys: pytest.CaptureFixture[str], file: Path, *flags: object) -> dict:
    """The object of --json; the status says whether anything was found."""
    status = cli.main(["doctor", "data", str(file), "--json", *map(str, flags)])
    found = json.loads(capsys.readouterr().out)
    assert status == bool(found["findings"])
    return found


def test_every_flaw_is_found_and_nothing_else(folder, capsys):
    flags = ["--image-folder", folder, "--tokenizer", TOKENIZER]
    report = examine(capsys, folder / "flawed.json", *flags)
    found = {(finding["row"], finding["kind"]): finding["reason"] for finding in report["findings"]}
    assert sorted(found) == [(i, kind) for i, (_, kind, _) in enumerate(FLAWED) if kind]
    for i, (_, kind, says) in enumerate(FLAWED):
        if kind:
            assert says in found[i, kind]
    assert (report["rows"], report["images"]) == (len(FLAWED), 4)


def test_visual_tokens_count_towards_the_length(folder, capsys):
    flags = ["--tokenizer", TOKENIZER, "--model-max-length", 600, "--visual-tokens"]
    for tokens, too_long in ((576, True), (64, False)):
        findings = examine(capsys, folder / "flawed.json", *flags, tokens)["findings"]
        assert ((2, "too-long") in {(one["row"], one["kind"]) for one in findings}) == too_long  # two images


def test_several_processes_find_the_same(folder, capsys):
    (file := folder / "many.json").write_text(json.dumps([row for row, _, _ in FLAWED] * 8))
    flags = ["--image-folder", folder, "--tokenizer", TOKENIZER, "--workers"]
    alone, together = (examine(capsys, file, *flags, workers) for workers in (0, 2))
    assert together == alone and len(alone["findings"]) > 100


def test_kinds_can_be_ignored(folder, capsys):
    ignored = [word for kind in doctor.KINDS if kind != "empty" for word in ("--ignore", kind)]
    found = examine(capsys, folder / "flawed.json", *ignored)
    assert found["counts"] == {"empty": 2} and [one["row"] for one in found["findings"]] == [13, 14]


def test_lines_for_people(folder, capsys):
    assert cli.main(["doctor", "data", str(folder / "flawed.json"), "--image-folder", str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any("row 4" in line and "gone.png" in line for line in out)
    (sound := folder / "sound.jsonl").write_text(
        "\n".join(json.dumps(row) for row, kind, _ in FLAWED if not kind)
    )
    assert cli.main(["doctor", "data", str(sound), "--image-folder", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("wrong", [["no.json"], ["flawed.json", "--image-folder", "no"]])
def test_wrong_paths_are_refused(wrong, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main(["doctor", "data", *wrong]) == 2
    assert wrong[-1] in capsys.readouterr().err
