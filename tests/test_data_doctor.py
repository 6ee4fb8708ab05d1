"""`llava doctor data`: one finding per flaw put in, none elsewhere."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava import cli
from llava.data import doctor

pytest.importorskip("datasets")

TOKENIZER = str(Path(__file__).parent / "data" / "text" / "tokenizers" / "tok_nonlegacy")


def sample(*texts: str, **fields: object) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**fields, "conversations": turns}


FLAWED: list[tuple[object, str | None, str]] = [
    # row, kind of finding, part of its reason
    (sample("<image>\nfine", "yes", id=0, image="a.png"), None, ""),
    (sample("fine", "too", id="1"), None, ""),
    (sample("<image> or <image>", "fine", image=["a.png", "b.png"]), None, ""),
    (sample("x", "dropped", "fine")["conversations"], "row", "object"),
    (sample("<image>", "x", image="gone.png"), "image", "gone.png: no such image file"),
    (sample("<image>", "y", image="torn.png"), "image", "torn.png is damaged"),
    (sample("<image>", "z", image="torn.png"), "image", "torn.png is damaged"),
    (sample("<image>", "x", "<image>", "x", image="a.png"), "image-count", "1 image and 2 <image>"),
    (sample("none", "x", image="a.png"), "image-count", "1 image and 0 <image>"),
    (sample("<image>", "x"), "image-count", "no images and 1 <image>"),
    (sample("a", "x", "b"), "turns", "does not end with an answer"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "turns",
        "turn 2 is from human",
    ),
    ({"conversations": [{"from": "system", "value": "a"}]}, "turns", "system"),
    (sample("a", " \n"), "empty", "turn 2, of gpt"),
    (sample("", "a"), "empty", "turn 1, of human"),
    (sample("fine", "too", id="other"), "duplicate", "row 1"),
    (sample("a", "b </s> c"), "masked", "marker"),
    (sample("long " * 3000, "x"), "too-long", "are cut off"),
    ({"conversations": [{"from": "gpt", "value": "first"}, *sample("a", "b!")["conversations"]]}, None, ""),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 30), 50).save(tmp_path / name)
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "flawed.json").write_text(json.dumps([row for row, _, _ in FLAWED]))
    return tmp_path


def test_every_flaw_is_found_and_nothing_else(folder: Path) -> None:
    report = doctor.examine(folder / "flawed.json", image_folder=folder, tokenizer_path=TOKENIZER)
    found = {(finding.row, finding.kind): finding.reason for finding in report.findings}
    assert sorted(found) == [(i, kind) for i, (_, kind, _) in enumerate(FLAWED) if kind]
    for i, (_, kind, says) in enumerate(FLAWED):
        if kind:
            assert says in found[i, kind]
    assert (report.rows, report.images) == (len(FLAWED), 4)


def test_visual_tokens_count_towards_the_length(folder: Path) -> None:
    def kinds(visual_tokens: int) -> set[str]:
        report = doctor.examine(
            folder / "flawed.json", tokenizer_path=TOKENIZER, max_length=600, visual_tokens=visual_tokens
        )
        return {(finding.row, finding.kind) for finding in report.findings}

    assert (2, "too-long") in kinds(576)  # two images
    assert (2, "too-long") not in kinds(64)


def test_many_rows_are_looked_at_by_processes(folder: Path) -> None:
    rows = [row for row, _, _ in FLAWED] * 8
    (folder / "many.json").write_text(json.dumps(rows))
    alone, together = (
        doctor.examine(folder / "many.json", image_folder=folder, tokenizer_path=TOKENIZER, workers=workers)
        for workers in (0, 2)
    )
    assert together == alone and len(alone.findings) > len(rows)


def test_lines_and_exit_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "flawed.json")
    assert cli.main(["doctor", "data", file, "--image-folder", str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("row 3 (id ): row: ")
    assert any(line.startswith("row 4 (id ): image: gone.png") for line in out)
    assert out[-1].startswith(f"{file}: {len(FLAWED)} rows, 4 images looked at: 1 row, 3 turns, 2 empty, ")
    assert not any("too-long" in line or "masked" in line for line in out)  # they take a tokenizer


def test_json_and_ignore(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "flawed.json")
    ignored = [word for kind in doctor.KINDS if kind != "empty" for word in ("--ignore", kind)]
    assert cli.main(["doctor", "data", file, "--json", *ignored]) == 1
    got = json.loads(capsys.readouterr().out)
    assert got["counts"] == {"empty": 2} and got["rows"] == len(FLAWED)
    assert [finding["row"] for finding in got["findings"]] == [13, 14]


def test_a_sound_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "sound.jsonl"
    file.write_text("\n".join(json.dumps(row) for row, kind, _ in FLAWED if kind is None))
    arguments = ["doctor", "data", str(file), "--image-folder", str(folder), "--tokenizer", TOKENIZER]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{file}: 4 rows, 2 images looked at: nothing wrong\n"


def test_wrong_paths_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "data", str(folder / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err
    flags = ["--image-folder", str(folder / "no")]
    assert cli.main(["doctor", "data", str(folder / "flawed.json"), *flags]) == 2
    assert "--image-folder" in capsys.readouterr().err
