"""The files for the servers, byte for byte what upstream's converters make, and what is never written."""

import json
import shutil

import pytest
from test_eval_score import EXPECTED, HERE, SETS, cases, files_of, root_of

from llava import cli


def submit(name, root, files, out, *more):
    arguments = ["submit", name, "--root", str(root), "--answers", *map(str, files), "--out", str(out), *more]
    return cli.main(arguments)


def sheet(file):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.load_workbook(file)
    assert book.sheetnames == ["Sheet1"]
    header, *rows = book["Sheet1"].iter_rows(values_only=True)
    return list(header), [list(row) for row in rows]


@pytest.mark.parametrize("path, case", cases("vqav2", "golden"))
def test_vqav2(path, case, tmp_path):
    assert submit("vqav2", root_of(path), files_of(path, case), tmp_path / "up.json") == 0
    assert json.loads((tmp_path / "up.json").read_text()) == case["upstream"]["upload"]


@pytest.mark.parametrize("path, case", cases("vqav2", "trap"))
def test_vqav2_traps(path, case, tmp_path, capsys):
    out = tmp_path / "up.json"
    assert submit("vqav2", root_of(path), files_of(path, case), out) == 1
    assert list(tmp_path.iterdir()) == []
    assert "nothing written" in capsys.readouterr().err
    existing = [file for file in files_of(path, case) if file.is_file()]
    assert submit("vqav2", root_of(path), existing, out, "--partial") == 0
    upload = json.loads(out.read_text())
    assert [row["question_id"] for row in upload] == [
        row["question_id"] for row in case["upstream"]["upload"]
    ]


def test_vqav2_answers_beyond_test_dev_are_kept(tmp_path):
    """test2015 as a whole may be answered (test-std); only test-dev has to be."""
    case = EXPECTED[HERE]["vqav2"]["cases"]["clean"]
    beyond = case["upstream"]["upload"][-1]["question_id"]
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"question_id": beyond, "text": "The Barn."}) + "\n")
    out = tmp_path / "up.json"
    assert submit("vqav2", root_of(HERE), [*files_of(HERE, case), more], out) == 0
    assert json.loads(out.read_text())[-1] == {"question_id": beyond, "answer": "barn"}


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench(name, tmp_path):
    for number, (path, case) in enumerate(param.values for param in cases(name, "golden")):
        out = tmp_path / f"{number}.xlsx"
        assert submit(name, root_of(path), files_of(path, case), out) == 0
        header, rows = sheet(out)
        assert header == case["upstream"]["header"]
        assert rows == case["upstream"]["rows"]


def test_mmbench_traps(tmp_path, capsys):
    for path in SETS:
        table, root = EXPECTED[path]["mmbench"]["cases"], root_of(path)
        for trap in ("duplicate", "partial", "unknown-id"):
            out = tmp_path / "up.xlsx"
            assert submit("mmbench", root, [root / table[f"trap-{trap}"]["answers"]], out) == 1
            assert not out.exists()
        assert submit("mmbench", root, [root / table["trap-partial"]["answers"]], out, "--partial") == 0
        assert sheet(out)[1] == table["trap-partial"]["upstream"]["rows"]
        out.unlink()


def test_mmbench_without_answer_columns(tmp_path, capsys):
    """A test split: it can be submitted and not scored."""
    import csv

    csv.field_size_limit(1 << 30)
    source = root_of(HERE) / "mmbench/mmbench_dev_20230712.tsv"
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    (tmp_path / "mmbench").mkdir()
    names = [name for name in rows[0] if name not in ("answer", "comment")]
    with open(tmp_path / "mmbench" / source.name, "w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    answers = files_of(HERE, EXPECTED[HERE]["mmbench"]["cases"]["clean"])
    out = tmp_path / "up.xlsx"
    assert submit("mmbench", tmp_path, answers, out) == 0
    assert sheet(out)[0] == ["index", "question", "A", "B", "C", "D", "prediction", "split"]
    assert cli.main(["score", "mmbench", "--root", str(tmp_path), "--answers", str(answers[0])]) == 2
    assert "no answers" in capsys.readouterr().err


def test_mmbench_answers_are_text(tmp_path):
    """An answer that looks like a formula or holds a control character does not hurt the sheet."""
    source = files_of(HERE, EXPECTED[HERE]["mmbench"]["cases"]["clean"])[0]
    rows = [json.loads(line) for line in source.open()]
    rows[0]["text"], rows[1]["text"] = "=1+1", "B\x07"
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert submit("mmbench", root_of(HERE), [answers], tmp_path / "up.xlsx") == 0
    predictions = {row[0]: row[6] for row in sheet(tmp_path / "up.xlsx")[1]}
    assert (predictions[rows[0]["question_id"]], predictions[rows[1]["question_id"]]) == ("=1+1", "B")


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_the_others(path, tmp_path):
    table, root = EXPECTED[path]["secondary"]["cases"], root_of(path)
    out = tmp_path / "out"
    assert submit("gqa", root, [root / table["gqa"]["answers"]], out) == 0
    assert json.loads(out.read_text()) == table["gqa"]["upstream"]["predictions"]
    assert submit("vizwiz", root, [root / table["vizwiz-clean"]["answers"]], out) == 0
    assert json.loads(out.read_text()) == table["vizwiz-clean"]["upstream"]["upload"]
    assert submit("seed", root, [root / table["seed_bench"]["answers"]], out) == 0
    assert list(map(json.loads, out.open())) == table["seed_bench"]["upstream"]["upload"]
    assert submit("mm-vet", root, [root / table["mm-vet"]["answers"]], out) == 0
    assert json.loads(out.read_text()) == table["mm-vet"]["upstream"]["results"]
    out.unlink()
    assert submit("vizwiz", root, [root / table["vizwiz-trap-missing"]["answers"]], out) == 1
    assert submit("seed", root, [root / table["seed_bench-trap-missing"]["answers"]], out) == 1
    assert not out.exists()


def test_seed_has_the_annotations_order(tmp_path):
    """Whatever the order of the questions and of the answers; without annotations that of the questions."""
    shutil.copytree(root_of(HERE) / "seed_bench", tmp_path / "seed_bench")
    annotations, out = tmp_path / "seed_bench/SEED-Bench.json", tmp_path / "out"
    table = json.loads(annotations.read_text())
    table["questions"].reverse()
    annotations.write_text(json.dumps(table))
    answers = tmp_path / "seed_bench/answers/synth-7b/1_0.jsonl"
    assert submit("seed", tmp_path, [answers], out) == 0
    want = EXPECTED[HERE]["secondary"]["cases"]["seed_bench"]["upstream"]["upload"]
    assert [json.loads(line) for line in out.open()] == want[::-1]
    annotations.unlink()
    assert submit("seed", tmp_path, [answers], out) == 0
    assert [json.loads(line) for line in out.open()] == want


def test_benchmarks_without_a_server(tmp_path, capsys):
    assert submit("pope", root_of(HERE), [root_of(HERE) / "pope/answers/clean.jsonl"], tmp_path / "x") == 2
    assert "llava score pope" in capsys.readouterr().err
