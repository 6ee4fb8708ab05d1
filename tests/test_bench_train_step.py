"""scripts/bench_train_step.py on the tiny checkpoint: what it asks, counts and writes."""

import json
import runpy
import shutil
import sys

import pytest


def test_steps_of_every_reducer_differ_in_visual_tokens_alone(root, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.tower, tiny.base / "vision_tower")
    command = f"bench --base {tiny.base} --version v1 --batch 2 --rounds 1 --json {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--reducers", "none", "topk(tokens=3)"])
    runpy.run_path(str(root / "scripts" / "bench_train_step.py"), run_name="__main__")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    dense, reduced = rows["none"], rows["topk(tokens=3)"]
    assert dense["visual_tokens_per_image"] > reduced["visual_tokens_per_image"] == 3
    assert dense["text_tokens"] == reduced["text_tokens"] > 100
    assert reduced["saved_by_flops"] == pytest.approx(1 - reduced["teraflop"] / dense["teraflop"])
    assert 0 < reduced["saved_by_flops"] < 1
    assert reduced["achieved"] * reduced["saved_by_flops"] == pytest.approx(
        1 - reduced["seconds"] / dense["seconds"]
    )
