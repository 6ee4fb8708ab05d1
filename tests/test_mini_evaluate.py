"""The test bed: one pass scores as asking alone does, figures as the slow way has them, and it goes on."""

import json
import math
import runpy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.cli import main
from llava.data import encode_conversation
from llava.mini import comparison, evaluate
from llava.mini.comparison import Pair, holm, weighted_auc
from llava.mini.world import World, generate


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    generate(World("dev", 0, edition=2), 3, folder)
    return folder


@torch.inference_mode()
def test_one_pass_scores_as_asking_alone_does(mini: tuple[Path, Path]) -> None:
    from llava.engine import ModelSource

    engine = ModelSource(str(mini[0]), str(mini[1]), conv_mode="smollm2", device="cpu").load()
    model, tokenizer = engine.model, engine.tokenizer
    tokens = torch.randn(9, model.config.mm_hidden_size, generator=torch.Generator().manual_seed(0)) * 2
    questions = [
        {"text": "What is in the picture?", "answer": "dog"},
        {"text": "Is there a very large elephant in this picture?", "answer": "No"},
        {"text": "Where is the cat?", "answer": "bottom right"},
        {"text": "Is there a star?", "answer": "Yes"},
    ]
    answers = evaluate.score(model, tokenizer, model.project([tokens])[0], questions)
    for question, scored in zip(questions, answers, strict=True):
        turns = [{"from": "human", "value": f"<image>\n{question['text']}"}]
        turns.append({"from": "gpt", "value": question["answer"]})
        ids, labels = encode_conversation(turns, tokenizer, "smollm2", has_image=True)
        output = model(input_ids=ids[None], labels=labels[None], visual_tokens=[tokens])
        answer = labels[labels != -100]
        assert scored["logprob"] == pytest.approx(-output.loss.item() * len(answer), abs=2e-3)
        said = model.generate(ids[None, : -len(answer)], visual_tokens=[tokens], max_new_tokens=len(answer))
        assert scored["right"] == (said[0].tolist() == answer.tolist())
        before = output.logits[0, -len(answer) - 1]
        yes, no = tokenizer("Yes No", add_special_tokens=False).input_ids
        no = tokenizer("No", add_special_tokens=False).input_ids[0]
        assert scored["margin"] == pytest.approx((before[yes] - before[no]).item(), abs=2e-3)


@pytest.mark.slow
def test_the_bed_goes_on_where_it_was(mini: tuple[Path, Path], world: Path, tmp_path: Path) -> None:
    command = f"mini evaluate --model-path {mini[0]} --model-base {mini[1]} --data {world} --out {tmp_path}"
    command += " --reducers topk(tokens=4) random(tokens=4) mmtok(tokens=4) --device cpu"
    assert main([*command.split(), "--scenes", "2"]) == 0
    first = json.loads((tmp_path / "table.json").read_text())
    file = tmp_path / "random-tokens=4.jsonl"
    kept = file.read_text().splitlines(keepends=True)
    file.write_text(kept[0] + kept[1][:50])  # killed while writing
    assert main([*command.split(), "--scenes", "2"]) == 0
    assert json.loads((tmp_path / "table.json").read_text()) == first
    assert main(command.split()) == 0
    assert file.read_text().startswith(kept[0]) and len(file.read_text().splitlines()) == 3
    report = json.loads((tmp_path / "table.json").read_text())
    questions = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = {key: answer for row in rows for key, answer in row["answers"].items()}
    assert answers.keys() == {str(question["question_id"]) for question in questions}
    presence = [answers[str(q["question_id"])]["right"] for q in questions if q["type"] == "presence"]
    figure = report["figures"]["random(tokens=4)"]["presence"]
    assert figure["value"] == pytest.approx(100 * np.mean(presence))
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert set(report["tokens"].values()) == {4}
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    other = [*command.split(), "--model-path", str(mini[1])]
    assert main(other) == 2


def test_area_under_the_curve_is_the_share_of_ordered_pairs() -> None:
    random = np.random.default_rng(0)
    margins, yes = random.integers(0, 6, 40).astype(float), random.random(40) < 0.4
    counts = np.stack([np.ones(40, int), random.integers(0, 3, 40)])
    for weights, area in zip(counts, weighted_auc(margins, yes, counts), strict=True):
        drawn = [place for place in range(40) for _ in range(weights[place])]
        pairs = product([i for i in drawn if yes[i]], [i for i in drawn if not yes[i]])
        wins = [(margins[a] > margins[b]) + 0.5 * (margins[a] == margins[b]) for a, b in pairs]
        assert area == pytest.approx(np.mean(wins))


def test_exact_test_of_pairs() -> None:
    """Against sums one does on paper."""
    assert Pair("", "", 5, 0).p == 2 / 32
    assert Pair("", "", 0, 0).p == 1
    assert Pair("", "", 2, 2).p == 1
    assert Pair("", "", 1, 3).p == 2 * (1 + 4) / 16


def test_holm_corrects_the_smallest_most() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Scenes of ten questions that are right together or not at all: the interval must know of it."""
    held = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        questions = [
            {"image": str(scene), "type": "naming", "form": "open", "answer": "x"}
            for scene in range(80)
            for _ in range(10)
        ]
        right = np.repeat(random.random(80) < 0.3, 10)
        answers = [{"right": bool(one), "logprob": -1.0, "margin": 0.0} for one in right]
        figure = comparison.figures(questions, answers, comparison.resample(questions, random))["naming"]
        assert figure.value == pytest.approx(100 * right.mean())
        held += figure.low <= 30 <= figure.high
    assert 0.85 < held / 60 <= 1


def test_the_constant_answer_is_the_most_frequent_right_one() -> None:
    questions = [
        {"image": "a", "type": "color", "form": "open", "answer": answer} for answer in ("red", "blue", "red")
    ]
    said = comparison.constants(questions)
    assert [one["right"] for one in said] == [True, False, True] and math.isnan(said[0]["logprob"])


def test_the_report_marks_who_is_better_than_prumerge_plus_at_as_many_tokens(tmp_path: Path) -> None:
    """Right in half of 40 questions, in all, in as many others, in none: 20 pairs to 0 are p = 2 / 2^20."""
    questions = [
        {"question_id": n, "image": f"{n // 4}", "type": "naming", "form": "open", "answer": "x"}
        for n in range(40)
    ]
    half = [n % 2 == 0 for n in range(40)]
    right = {
        "prumerge+(tokens=8)": (9, half),
        "good(tokens=8)": (8, [True] * 40),
        "other(tokens=8)": (8, [not one for one in half]),
        "random(tokens=8)": (8, [False] * 40),
        "good(tokens=4)": (4, [False] * 40),
        "good(merge=false, tokens=4)": (4, half),
        "good(tokens=8, merge=false)": (8, half),
        "good": (4, half),
    }
    rows: dict[str, dict[str, dict]] = {}
    for spec, (tokens, flags) in right.items():
        for question, flag in zip(questions, flags, strict=True):
            empty: dict = {"tokens": tokens, "answers": {}}
            answers = rows.setdefault(spec, {}).setdefault(question["image"], empty)["answers"]
            answers[str(question["question_id"])] = {"right": flag, "logprob": -1.0, "margin": 0.0}
    comparison.write_report(tmp_path, questions, rows)
    head, _, *lines = (tmp_path / "table.md").read_text().splitlines()[:8]
    assert head == "| reducer | 4 | 8 |"
    assert lines == [
        "| prumerge+ |  | 50.0 ± 0.0 |",
        "| good | 0.0 ± 0.0 | 100.0 ± 0.0 ▲ |",
        "| other |  | 50.0 ± 0.0 |",
        "| random |  | 0.0 ± 0.0 ▼ |",
        "| good(merge=false) | 50.0 ± 0.0 | 50.0 ± 0.0 |",
        "| good at 4.0 | 50.0 ± 0.0 |  |",
    ]


def test_checkpoints_are_compared_as_reducers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """scripts/mini_budgets.py: one checkpoint right in all of 40 questions, one in none, at each number."""
    names = ("low", "2nd")
    questions = [
        {"question_id": n, "image": f"{n // 4}", "type": "naming", "form": "open", "answer": "x"}
        for n in range(40)
    ]
    write_lines(tmp_path / "world" / "questions.jsonl", questions)
    for spec, tokens in (("prumerge+(tokens=16)", 17), ("none", 576)):
        for name in names:
            answer = {"right": name == "2nd", "logprob": -1.0, "margin": 0.0}
            rows = [
                {
                    "question_id": f"{scene}",
                    "prompt": spec,
                    "tokens": tokens,
                    "answers": {str(4 * scene + n): answer for n in range(4)},
                }
                for scene in range(10)
            ]
            write_lines(tmp_path / f"bed-{name}" / f"{tokens}.jsonl", rows)
    monkeypatch.setattr("sys.argv", ["mini_budgets.py", f"{tmp_path / 'world'}", f"{tmp_path}", *names])
    runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "mini_budgets.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "| reducer | 17 | 576 |",
        "| --- | --- | --- |",
        "| low | 0.0 ± 0.0 | 0.0 ± 0.0 |",
        "| 2nd | 100.0 ± 0.0 | 100.0 ± 0.0 |",
    ]
    pairs = [line for line in lines if line.startswith("| 2nd(tokens=") and "| low(tokens=" in line]
    assert len(pairs) == 2 and all("| 40 | 0 |" in pair for pair in pairs)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
