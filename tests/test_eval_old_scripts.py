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

from llava import legacy
from llava.errors import UserError


def flags(**values):
    """{"result_file": x} as ["--result-file", "x"]."""
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("path, case", cases("pope", "golden"))
def test_eval_pope(path, case, capsys):
    folder = root_of(path) / "pope"
    given = flags(annotation_dir=folder / "coco", question_file=folder / "llava_pope_test.jsonl")
    assert legacy.eval_pope([*given, *flags(result_file=files_of(path, case)[0])]) == 0
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
    given = flags(annotation_file=annotations, result_file=files_of(path, case)[0])
    assert legacy.eval_textvqa(given) == 0
    want = case["upstream"]
    printed = f"Samples: {want['samples']}\nAccuracy: {want['accuracy_printed']:.2f}%\n"
    assert printed in capsys.readouterr().out


def test_eval_textvqa_refuses_and_takes_folders(capsys):
    folder = root_of(HERE) / "textvqa"
    given = flags(annotation_file=folder / "TextVQA_0.5.1_val.json", result_dir=folder / "answers")
    assert legacy.eval_textvqa(given) == 1  # there are traps among them
    out = capsys.readouterr()
    assert out.out.count("Accuracy: ") == 8 and "has no answer" in out.err


def science_flags(folder, answers, out):
    given = flags(base_dir=folder, result_file=answers)
    return [*given, *flags(output_file=out / "details.json", output_result=out / "result.json")]


@pytest.mark.parametrize("path, case", cases("scienceqa", "golden"))
def test_eval_science_qa(path, case, tmp_path, capsys):
    given = science_flags(root_of(path) / "scienceqa", files_of(path, case)[0], tmp_path)
    assert legacy.eval_science_qa(given) == 0
    want = case["upstream"]
    out = capsys.readouterr().out
    total = f"Total: {want['total']}, Correct: {want['correct']}, Accuracy: {want['accuracy_printed']:.2f}%"
    assert total in out and f"IMG-Accuracy: {want['img_accuracy_printed']:.2f}%" in out
    summary, parts = (json.loads((tmp_path / name).read_text()) for name in ("result.json", "details.json"))
    assert summary["acc"] == pytest.approx(want["accuracy"])
    assert (summary["correct"], summary["count"]) == (want["correct"], want["total"])
    assert summary["results"] == want["pred_index"]
    assert {row["question_id"] for row in parts["correct"]} == set(want["correct_ids"])
    assert {r["question_id"]: r["parsed_ans"] for one in parts.values() for r in one} == want["parsed"]


def test_eval_science_qa_takes_the_split_that_is_named(tmp_path, capsys):
    folder = shutil.copytree(root_of(HERE) / "scienceqa", tmp_path / "scienceqa")
    rows = (folder / "answers/clean.jsonl").read_text().splitlines()[:3]
    splits = json.loads((folder / "pid_splits.json").read_text())
    splits["minitest"] = [json.loads(row)["question_id"] for row in rows]
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    given, out = science_flags(folder, tmp_path / "a.jsonl", tmp_path / "out"), tmp_path / "out"
    assert legacy.eval_science_qa(given) == 1  # the test split has more questions
    assert "has no answer" in capsys.readouterr().err and not out.exists()
    assert legacy.eval_science_qa([*given, "--split", "minitest"]) == 0
    assert "Total: 3, " in capsys.readouterr().out
    with pytest.raises(UserError, match="maxitest"):
        legacy.eval_science_qa([*given, "--split", "maxitest"])


@pytest.mark.parametrize("path, case", [*cases("vqav2", "golden"), *cases("vqav2", "trap")[:1]])
def test_convert_vqav2(path, case, tmp_path):
    """LLaVA's layout with the merged chunks; nothing is written of answers that are not right."""
    split, ckpt = "llava_vqav2_mscoco_test-dev2015", "synth"
    merged = tmp_path / "answers" / split / ckpt / "merge.jsonl"
    merged.parent.mkdir(parents=True)
    merged.write_text("".join(file.read_text() for file in files_of(path, case) if file.is_file()))
    for name in (f"{split}.jsonl", "llava_vqav2_mscoco_test2015.jsonl"):
        shutil.copy(root_of(path) / "vqav2" / name, tmp_path / name)
    upload = tmp_path / "answers_upload" / split / f"{ckpt}.json"
    status = legacy.vqav2_for_submission(flags(dir=tmp_path, ckpt=ckpt, split=split))
    assert status == (case["kind"] == "trap") == (not upload.exists())
    if case["kind"] == "golden":
        assert json.loads(upload.read_text()) == case["upstream"]["upload"]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_convert_mmbench(name, tmp_path):
    for path, case in (param.values for param in cases(name, "golden")):
        answers, table = files_of(path, case)[0], root_of(path) / EXPECTED[path][name]["annotation"]
        given = flags(annotation_file=table, result_dir=answers.parent, upload_dir=tmp_path)
        assert legacy.mmbench_for_submission([*given, *flags(experiment=answers.stem)]) == 0
        header, rows = sheet(tmp_path / f"{answers.stem}.xlsx")
        assert (header, rows) == (case["upstream"]["header"], case["upstream"]["rows"])


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_convert_the_others(path, tmp_path, capsys):
    table, root, out = EXPECTED[path]["secondary"]["cases"], root_of(path), tmp_path / "out"

    def answers(case):
        return root / table[case]["answers"]

    assert legacy.gqa_for_eval(flags(src=answers("gqa"), dst=out)) == 0
    assert json.loads(out.read_text()) == table["gqa"]["upstream"]["predictions"]
    assert legacy.mmvet_for_eval(flags(src=answers("mm-vet"), dst=out)) == 0
    assert json.loads(out.read_text()) == table["mm-vet"]["upstream"]["results"]
    given = flags(annotation_file=root / "vizwiz/llava_test.jsonl", result_upload_file=out)
    convert = legacy.vizwiz_for_submission
    assert convert([*given, *flags(result_file=answers("vizwiz-clean"))]) == 0
    assert json.loads(out.read_text()) == table["vizwiz-clean"]["upstream"]["upload"]
    assert convert([*given, *flags(result_file=answers("vizwiz-trap-missing"))]) == 1
    given = flags(annotation_file=root / "seed_bench/SEED-Bench.json", result_upload_file=out)
    capsys.readouterr()
    assert legacy.seed_for_submission([*given, *flags(result_file=answers("seed_bench"))]) == 0
    assert [json.loads(line) for line in out.open()] == table["seed_bench"]["upstream"]["upload"]
    assert f"accuracy: {table['seed_bench']['upstream']['printed']['Total']:g}" in capsys.readouterr().out


def test_converters_run_as_scripts():
    """Each script of scripts/ calls the function of its name."""
    for file in sorted((Path(__file__).parents[1] / "scripts").glob("convert_*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        name = file.stem.removeprefix("convert_")
        assert getattr(module, name) is getattr(legacy, name)
        assert f"script({name})" in file.read_text()
    script = Path(__file__).parents[1] / "scripts/convert_gqa_for_eval.py"
    done = subprocess.run(
        [sys.executable, str(script), "--src", "no.jsonl", "--dst", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no.jsonl: no such answers file" in done.stderr
