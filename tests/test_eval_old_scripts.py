"""LLaVA's scoring and converting scripts: same flags, same files, the golden outcomes; and refusals."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_eval_score import EXPECTED, HERE, SETS, cases, files_of, root_of
from test_eval_submit import sheet

from llava.errors import UserError
from llava.eval import legacy_scoring


@pytest.mark.parametrize("path, case", cases("pope", "golden"))
def test_eval_pope(path, case, capsys):
    folder = root_of(path) / "pope"
    flags = [
        "--annotation-dir",
        str(folder / "coco"),
        "--question-file",
        str(folder / "llava_pope_test.jsonl"),
    ]
    assert legacy_scoring.eval_pope([*flags, "--result-file", str(files_of(path, case)[0])]) == 0
    blocks = capsys.readouterr().out.split("Category: ")[1:]
    assert len(blocks) == 3
    for block in blocks:
        want = case["upstream"]["by_category"][block.partition(",")[0]]
        lines = block.splitlines()
        assert lines[2] == "\t".join(str(want[cell]) for cell in ("TP", "FP", "TN", "FN"))
        assert lines[0].endswith(f"# samples: {want['samples']}")
        printed = dict(line.split(": ") for line in lines[3:8])
        assert float(printed["F1 score"]) == pytest.approx(want["f1"])
        assert float(printed["Yes ratio"]) == pytest.approx(want["yes_ratio"])
        assert lines[8].startswith(f"{want['f1']:.3f}, {want['accuracy']:.3f}, ")


@pytest.mark.parametrize("path, case", cases("textvqa", "golden"))
def test_eval_textvqa(path, case, capsys):
    annotations = root_of(path) / "textvqa/TextVQA_0.5.1_val.json"
    flags = ["--annotation-file", str(annotations), "--result-file", str(files_of(path, case)[0])]
    assert legacy_scoring.eval_textvqa(flags) == 0
    want = case["upstream"]
    assert (
        f"Samples: {want['samples']}\nAccuracy: {want['accuracy_printed']:.2f}%\n" in capsys.readouterr().out
    )


def test_eval_textvqa_refuses_and_takes_folders(capsys):
    folder = root_of(HERE) / "textvqa"
    flags = [
        "--annotation-file",
        str(folder / "TextVQA_0.5.1_val.json"),
        "--result-dir",
        str(folder / "answers"),
    ]
    assert legacy_scoring.eval_textvqa(flags) == 1  # there are traps among them
    out = capsys.readouterr()
    assert out.out.count("Accuracy: ") == 8 and "has no answer" in out.err


@pytest.mark.parametrize("path, case", cases("scienceqa", "golden"))
def test_eval_science_qa(path, case, tmp_path, capsys):
    details, result = tmp_path / "details.json", tmp_path / "result.json"
    flags = ["--base-dir", str(root_of(path) / "scienceqa"), "--result-file", str(files_of(path, case)[0])]
    flags += ["--output-file", str(details), "--output-result", str(result)]
    assert legacy_scoring.eval_science_qa(flags) == 0
    want = case["upstream"]
    out = capsys.readouterr().out
    assert (
        f"Total: {want['total']}, Correct: {want['correct']}, Accuracy: {want['accuracy_printed']:.2f}%"
        in out
    )
    assert f"IMG-Accuracy: {want['img_accuracy_printed']:.2f}%" in out
    summary, parts = json.loads(result.read_text()), json.loads(details.read_text())
    assert summary["acc"] == pytest.approx(want["accuracy"])
    assert (summary["correct"], summary["count"]) == (want["correct"], want["total"])
    assert summary["results"] == want["pred_index"]
    assert {row["question_id"] for row in parts["correct"]} == set(want["correct_ids"])
    assert {r["question_id"]: r["parsed_ans"] for one in parts.values() for r in one} == want["parsed"]


def test_eval_science_qa_writes_nothing_of_partial_answers(tmp_path, capsys):
    answers = files_of(HERE, EXPECTED[HERE]["scienceqa"]["cases"]["trap-partial"])[0]
    flags = ["--base-dir", str(root_of(HERE) / "scienceqa"), "--result-file", str(answers)]
    assert (
        legacy_scoring.eval_science_qa(
            [*flags, "--output-file", str(tmp_path / "a"), "--output-result", str(tmp_path / "b")]
        )
        == 1
    )
    assert list(tmp_path.iterdir()) == [] and "has no answer" in capsys.readouterr().err


def test_eval_science_qa_takes_the_split_that_is_named(tmp_path, capsys):
    folder = tmp_path / "scienceqa"
    shutil.copytree(root_of(HERE) / "scienceqa", folder)
    rows = (folder / "answers/clean.jsonl").read_text().splitlines()[:3]
    splits = json.loads((folder / "pid_splits.json").read_text())
    splits["minitest"] = [json.loads(row)["question_id"] for row in rows]
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    flags = ["--base-dir", str(folder), "--result-file", str(tmp_path / "a.jsonl")]
    flags += ["--output-file", str(tmp_path / "b"), "--output-result", str(tmp_path / "c")]
    assert legacy_scoring.eval_science_qa([*flags, "--split", "minitest"]) == 0
    assert "Total: 3, " in capsys.readouterr().out
    with pytest.raises(UserError, match="maxitest"):
        legacy_scoring.eval_science_qa([*flags, "--split", "maxitest"])


def vqav2_folder(path, case, tmp_path):
    """LLaVA's layout with the merged chunks."""
    folder = tmp_path / "vqav2"
    split, ckpt = "llava_vqav2_mscoco_test-dev2015", "synth"
    merged = folder / "answers" / split / ckpt / "merge.jsonl"
    merged.parent.mkdir(parents=True)
    merged.write_text("".join(file.read_text() for file in files_of(path, case) if file.is_file()))
    for name in (f"{split}.jsonl", "llava_vqav2_mscoco_test2015.jsonl"):
        (folder / name).write_text((root_of(path) / "vqav2" / name).read_text())
    flags = ["--dir", str(folder), "--ckpt", ckpt, "--split", split]
    return flags, folder / "answers_upload" / split / f"{ckpt}.json"


@pytest.mark.parametrize("path, case", cases("vqav2", "golden"))
def test_convert_vqav2(path, case, tmp_path):
    flags, upload = vqav2_folder(path, case, tmp_path)
    assert legacy_scoring.vqav2_for_submission(flags) == 0
    assert json.loads(upload.read_text()) == case["upstream"]["upload"]


@pytest.mark.parametrize("path, case", cases("vqav2", "trap"))
def test_convert_vqav2_traps(path, case, tmp_path):
    flags, upload = vqav2_folder(path, case, tmp_path)
    assert legacy_scoring.vqav2_for_submission(flags) == 1
    assert not upload.exists()


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_convert_mmbench(name, tmp_path):
    for path, case in (param.values for param in cases(name, "golden")):
        answers = files_of(path, case)[0]
        table = root_of(path) / EXPECTED[path][name]["annotation"]
        flags = ["--annotation-file", str(table), "--result-dir", str(answers.parent)]
        assert (
            legacy_scoring.mmbench_for_submission(
                [*flags, "--upload-dir", str(tmp_path), "--experiment", answers.stem]
            )
            == 0
        )
        header, rows = sheet(tmp_path / f"{answers.stem}.xlsx")
        assert (header, rows) == (case["upstream"]["header"], case["upstream"]["rows"])


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_convert_the_others(path, tmp_path, capsys):
    table, root, out = EXPECTED[path]["secondary"]["cases"], root_of(path), tmp_path / "out"
    assert legacy_scoring.gqa_for_eval(["--src", str(root / table["gqa"]["answers"]), "--dst", str(out)]) == 0
    assert json.loads(out.read_text()) == table["gqa"]["upstream"]["predictions"]
    assert (
        legacy_scoring.mmvet_for_eval(["--src", str(root / table["mm-vet"]["answers"]), "--dst", str(out)])
        == 0
    )
    assert json.loads(out.read_text()) == table["mm-vet"]["upstream"]["results"]
    flags = ["--annotation-file", str(root / "vizwiz/llava_test.jsonl"), "--result-upload-file", str(out)]
    assert (
        legacy_scoring.vizwiz_for_submission(
            [*flags, "--result-file", str(root / table["vizwiz-clean"]["answers"])]
        )
        == 0
    )
    assert json.loads(out.read_text()) == table["vizwiz-clean"]["upstream"]["upload"]
    torn = root / table["vizwiz-trap-missing"]["answers"]
    assert legacy_scoring.vizwiz_for_submission([*flags, "--result-file", str(torn)]) == 1
    flags = ["--annotation-file", str(root / "seed_bench/SEED-Bench.json"), "--result-upload-file", str(out)]
    capsys.readouterr()
    assert (
        legacy_scoring.seed_for_submission(
            [*flags, "--result-file", str(root / table["seed_bench"]["answers"])]
        )
        == 0
    )
    assert [json.loads(line) for line in out.open()] == table["seed_bench"]["upstream"]["upload"]
    assert f"accuracy: {table['seed_bench']['upstream']['printed']['Total']:g}" in capsys.readouterr().out


def test_converters_run_as_scripts():
    """Each script of scripts/ calls the function of its name."""
    for file in sorted((Path(__file__).parents[1] / "scripts").glob("convert_*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        name = file.stem.removeprefix("convert_")
        assert getattr(module, name) is getattr(legacy_scoring, name)
        assert f"main({name})" in file.read_text()
    script = Path(__file__).parents[1] / "scripts/convert_gqa_for_eval.py"
    done = subprocess.run(
        [sys.executable, str(script), "--src", "no.jsonl", "--dst", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no.jsonl: no such answers file" in done.stderr
