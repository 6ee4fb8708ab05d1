"""The shipped small checkpoint, end to end: scenes it never saw, real commands, what it must still know."""

import json

import pytest

from llava import cli


@pytest.mark.slow
def test_it_answers_about_scenes_it_never_saw(mini, tmp_path, capsys):
    checkpoint, base = mini
    world, out = tmp_path / "world", tmp_path / "table"
    made = f"mini world --split test --n 16 --seed 3 --out {world}"
    asked = f"mini evaluate --model-path {checkpoint} --model-base {base} --data {world} --out {out}"
    assert cli.main(made.split()) == 0
    which = ["--reducers", "prumerge(tokens=16)", "random(tokens=16)"]
    assert cli.main([*asked.split(), *which, "--device", "cpu"]) == 0
    report = json.loads((out / "table.json").read_text())
    questions = (world / "questions.jsonl").read_text().splitlines()
    assert report["questions"] == len(questions)
    figures = report["figures"]

    def points_over_constant(kind: str) -> float:
        return figures["prumerge(tokens=16)"][kind]["value"] - figures["constant answer"][kind]["value"]

    # The table in docs/mini.md says 30 and 60; a few dozen questions leave some noise.
    assert points_over_constant("presence") > 15
    assert points_over_constant("naming") > 25
    assert "constant answer" in capsys.readouterr().out
    (pair,) = (pair for pair in report["pairs"] if pair["other"] == "random(tokens=16)")
    assert pair["only_first"] > pair["only_other"]


def test_the_checkpoint_says_how_many_tokens_it_wants(root):
    config = json.loads((root / "checkpoints/mini-lora/config.json").read_text())
    assert config["mm_token_reducer"].startswith("prumerge")
