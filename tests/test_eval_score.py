"""Scores against the outcomes of the upstream scorers, and the ways in which answers can be wrong.

The reference data is a small set in the official file formats with upstream's own outcomes (expected.json).
A copy lies in tests/data/eval; the set beside the project, where it is there, is tested as well.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava import cli
from llava.eval import benchmarks
from llava.eval.benchmarks import mmbench, mme, pope, scienceqa
from llava.eval.normalize import m4c, soft_score, vqa_official
from llava.eval.score import score as score_of

HERE = Path(__file__).parent / "data" / "eval"
SETS = [path for path in (HERE, HERE.parents[3] / "shared" / "golden" / "eval") if path.is_dir()]
EXPECTED = {path: json.loads((path / "expected.json").read_text(encoding="utf-8")) for path in SETS}


def cases(name, kind):
    """(id, set folder, case) of one benchmark's cases."""
    return [
        pytest.param(path, case, id=f"{path.parent.name}-{label}")
        for path in SETS
        for label, case in EXPECTED[path][name]["cases"].items()
        if case["kind"] == kind
    ]


def root_of(path):
    return path / EXPECTED[path]["root"]


def files_of(path, case):
    return [root_of(path) / name for name in case.get("chunks") or [case["answers"]]]


def json_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def score(capsys):
    """(exit status, the printed object) of `llava score`."""

    def run(name, root, files, *more):
        status = cli.main(
            ["score", name, "--root", str(root), "--answers", *map(str, files), "--json", *more]
        )
        out = capsys.readouterr().out
        return status, json.loads(out) if out else None

    return run


def scored(result):
    status, report = result
    assert status == 0 and not report["problems"], report
    assert report["expected"] == report["answered"] == report["headline"]["over"]
    assert report["headline"]["value"] == report["metrics"][report["headline"]["name"]]
    low, high = report["headline"]["interval"]
    assert low <= high
    return report["metrics"]


def refused(result, *words):
    """No headline, and the problems name every one of `words`."""
    status, report = result
    assert status == 1 and report["headline"] is None and report["metrics"] == {}
    for word in words:
        assert any(word in problem for problem in report["problems"]), (word, report["problems"])
    return report


def asker(score, path, name):
    """(the cases of a benchmark, a function that scores the answers of one)."""
    table, root = EXPECTED[path][name]["cases"], root_of(path)
    return table, lambda case, *more: score(name, root, [root / table[case]["answers"]], *more)


exact = dict(rel=0, abs=1e-9)
SIX_PLACES = dict(rel=0, abs=5.1e-7)  # expected.json keeps VQA accuracies to six places


# --- normalisers and parsers ---


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_normalisers(path):
    for raw, by_m4c, by_vqa in EXPECTED[path]["normalizer"]["rows"]:
        assert (m4c(raw), vqa_official(raw)) == (by_m4c, by_vqa), raw


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_pope_parser(path):
    for text, answer in EXPECTED[path]["pope"]["parse_rows"]:
        assert pope.read_answer(text) == answer, text


def test_soft_score_is_the_leave_one_out_mean():
    for matches in range(11):
        others = [matches - 1] * matches + [matches] * (10 - matches)
        slow = sum(min(agreeing / 3, 1) for agreeing in others) / 10
        assert soft_score(matches) == pytest.approx(slow)


def test_mme_reads_four_characters():
    for text, answer in {
        "Yes": "yes", "no": "no", "eyes wide": "yes", "know": "no", "None": "no", "not": "no",
        "nope": "no", "unknown": "other", "I do not": "other", " yes": "yes", "": "other",
        "Yes\nIt is.": "yes", "N\to": "other",
    }.items():  # fmt: skip
        assert mme.read_answer(text) == answer, text


# --- upstream's outcomes ---


@pytest.mark.parametrize("path, case", cases("vqav2", "golden"))
def test_vqav2(score, path, case):
    metrics = scored(score("vqav2", root_of(path), files_of(path, case)))
    want = case["upstream"]["vqa_accuracy"]["test-dev"]
    assert metrics["accuracy"] == pytest.approx(want["overall"], **SIX_PLACES)
    assert metrics["per_answer_type"] == pytest.approx(want["per_answer_type"], **SIX_PLACES)
    assert metrics["per_question_type"] == pytest.approx(want["per_question_type"], **SIX_PLACES)


@pytest.mark.parametrize("path, case", cases("textvqa", "golden"))
def test_textvqa(score, path, case):
    metrics = scored(score("textvqa", root_of(path), files_of(path, case)))
    assert metrics["accuracy"] == pytest.approx(case["upstream"]["accuracy"], **exact)


@pytest.mark.parametrize("path, case", cases("mme", "golden"))
def test_mme(score, path, case):
    metrics = scored(score("mme", root_of(path), files_of(path, case)))
    want = case["upstream"]
    assert metrics["perception"] == pytest.approx(want["perception"], **exact)
    assert metrics["cognition"] == pytest.approx(want["cognition"], **exact)
    assert set(metrics["subtasks"]) == set(want["subtasks"])
    for name, figures in want["subtasks"].items():
        assert {key: metrics["subtasks"][name][key] for key in figures} == pytest.approx(figures, **exact), (
            name
        )


@pytest.mark.parametrize("path, case", cases("pope", "golden"))
def test_pope(score, path, case):
    metrics = scored(score("pope", root_of(path), files_of(path, case)))
    assert metrics["f1"] == pytest.approx(100 * case["upstream"]["mean_f1"], **exact)
    for name, figures in case["upstream"]["by_category"].items():
        figures = {"n" if key == "samples" else key: value for key, value in figures.items()}
        assert {key: metrics["by_category"][name][key] for key in figures} == pytest.approx(
            figures, **exact
        ), name


@pytest.mark.parametrize("path, case", cases("scienceqa", "golden"))
def test_scienceqa(score, path, case):
    metrics = scored(score("scienceqa", root_of(path), files_of(path, case)))
    want = case["upstream"]
    assert metrics["accuracy"] == pytest.approx(want["accuracy"], **exact)
    assert metrics["img_accuracy"] == pytest.approx(want["img_accuracy"], **exact)
    for line in files_of(path, case)[0].read_text().splitlines():
        row = json.loads(line)
        assert (scienceqa.read_answer(row["text"]) or "FAILED") == want["parsed"][row["question_id"]]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench(score, name):
    for path, case in (param.values for param in cases(name, "golden")):
        want = case["upstream"]["exact_match_eval"]
        metrics = scored(score(name, root_of(path), files_of(path, case)))
        assert metrics["circular"] == pytest.approx(100 * want["circular_overall"], **exact)
        assert metrics["vanilla"] == pytest.approx(100 * want["vanilla_overall"], **exact)
        for ours, theirs in (
            ("by_category", "circular_by_category"),
            ("by_l2_category", "circular_by_l2-category"),
        ):
            assert metrics[ours] == pytest.approx({key: 100 * x for key, x in want[theirs].items()}, **exact)
        samples = benchmarks.get(name).load(root_of(path))
        texts = {row["question_id"]: row["text"] for row in json_lines(files_of(path, case)[0])}
        parsed = {str(s.id): mmbench.read_answer(texts[s.id], s.options) for s in samples}
        assert parsed == want["parsed"]


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_secondary(score, path):
    cases_, root = EXPECTED[path]["secondary"]["cases"], root_of(path)
    gqa = scored(score("gqa", root, [root / cases_["gqa"]["answers"]]))
    assert gqa["accuracy"] == pytest.approx(100 * cases_["gqa"]["upstream"]["accuracy_exact"], **exact)
    seed = scored(score("seed", root, [root / cases_["seed_bench"]["answers"]]))
    printed = cases_["seed_bench"]["upstream"]["printed"]
    assert (seed["accuracy"], seed["image"], seed["video"]) == (
        printed["Total"],
        printed["image"],
        printed["video"],
    )
    assert seed["by_type"] == {key: printed[key] for key in seed["by_type"]}
    wild = scored(score("llava-bench", root, [root / cases_["llava-bench"]["reviews"]]))
    want = cases_["llava-bench"]["upstream"]["rows"]
    assert wild["all"] == want["all"][0]
    for name, row in want.items():
        figures = wild["by_category"][name.removeprefix("llava_bench_")]
        assert [figures["ratio"], figures["reference"], figures["candidate"]] == row


# --- traps: right, or refused with the reason ---


@pytest.mark.parametrize("path, case", cases("vqav2", "trap"))
def test_vqav2_traps(score, path, case):
    """Every torn line, lost chunk, missing question and second answer is named."""
    root, files = root_of(path), files_of(path, case)
    existing = [file for file in files if file.is_file()]
    rows = [(f"{file}:{number}: ", line) for file in existing for number, line in lines(file)]
    ids = [json.loads(line)["question_id"] for _, line in rows if is_json(line)]
    asked = {sample.id for sample in benchmarks.get("vqav2").load(root)}
    refused(
        score("vqav2", root, files),
        *(where for where, line in rows if not is_json(line)),
        *(f"{file}: no such file" for file in files if file not in existing),
        *(f"question {identifier} " for identifier in asked - set(ids)),
        *(f"duplicate answer to question {identifier} " for identifier in ids if ids.count(identifier) > 1),
    )
    status, partial = score("vqav2", root, existing, "--partial")
    assert status == 0 and partial["headline"]["over"] == len(asked & set(ids)) and partial["problems"]
    if not asked - set(ids):  # every question has an answer: the later one counts, as upstream
        want = case["upstream"]["vqa_accuracy"]["test-dev"]["overall"]
        assert partial["metrics"]["accuracy"] == pytest.approx(want, **SIX_PLACES)


def lines(file):
    return enumerate(file.read_text(encoding="utf-8").splitlines(), 1)


def is_json(line):
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_textvqa_traps(score, path):
    table, run = asker(score, path, "textvqa")
    clean = table["clean"]["upstream"]["accuracy"]
    for name in ("trap-four-lines", "trap-stripped-ocr-line"):  # upstream raises; the question is there
        assert scored(run(name))["accuracy"] == pytest.approx(clean, **exact)
    refused(run("trap-duplicate"), ":13: duplicate answer")
    refused(run("trap-partial"), "has no answer")
    refused(run("trap-unknown-question"), ":1: unknown question")
    assert refused(run("trap-empty"), "has no answer")["answered"] == 0
    status, report = run("trap-empty", "--partial")
    assert status == 1 and report["headline"] is None
    status, report = run("trap-partial", "--partial")
    want = table["trap-partial"]["upstream"]
    assert status == 0 and report["headline"]["over"] == want["samples"] < report["expected"]
    assert report["metrics"]["accuracy"] == pytest.approx(want["accuracy"], **exact)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_mme_traps(score, path):
    table, run = asker(score, path, "mme")
    clean = scored(run("clean"))
    assert scored(run("trap-unpaired")) == clean  # pairs are images, whatever the order
    assert scored(run("trap-newline")) == scored(run("trap-tab")) == clean
    other, want = scored(run("trap-all-other")), table["trap-all-other"]["upstream_with_sklearn_1_2_2"]
    assert (other["perception"], other["cognition"]) == (want["perception"], want["cognition"])
    refused(run("trap-duplicate-image"), "duplicate answer")
    assert len(refused(run("trap-missing-one"))["problems"]) == 1
    assert len(refused(run("trap-missing-two"))["problems"]) == 2
    refused(run("trap-missing-subtask"), "has no answer")
    refused(run("trap-unknown-question"), "unknown question", "has no answer")
    status, partial = run("trap-missing-one", "--partial")
    subtask = partial["problems"][0].split("question ")[1].partition("/")[0]
    assert status == 0 and partial["metrics"]["subtasks"][subtask]["n"] == clean["subtasks"][subtask]["n"] - 1


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_pope_traps(score, path, tmp_path, capsys):
    (table, run), root = asker(score, path, "pope"), root_of(path)
    clean = scored(run("clean"))
    assert scored(run("trap-shuffled")) == clean
    assert scored(run("trap-all-no"))["f1"] == 0
    refused(run("trap-category-missing"), "has no answer")
    partial = run("trap-category-missing", "--partial")[1]
    f1 = [figures["f1"] for figures in partial["metrics"]["by_category"].values() if figures["n"]]
    assert len(f1) == 2 and partial["headline"]["value"] == pytest.approx(50 * sum(f1))
    assert len(refused(run("trap-missing-first"), "question 1 ")["problems"]) == 1
    refused(run("trap-duplicate"), "duplicate answer to question 1 ")

    copy = tmp_path / "eval"
    shutil.copytree(root / "pope", copy / "pope")
    (copy / "pope/coco/.DS_Store").write_bytes(b"\0\1")
    answers = [root / table["clean"]["answers"]]
    assert scored(score("pope", copy, answers)) == clean
    setup = table["trap-annotation-release-mismatch"]["setup"]
    labels = copy / setup["prepend_to"]
    labels.chmod(0o644)
    labels.write_text(setup["line"] + "\n" + labels.read_text())
    for more in ([], ["--partial"]):
        assert cli.main(["score", "pope", "--root", str(copy), "--answers", str(answers[0]), *more]) == 2
        assert str(labels) in capsys.readouterr().err


def test_pope_labels_of_another_release(tmp_path, capsys):
    """Same number of rows, other questions: upstream scores them by position."""
    shutil.copytree(root_of(HERE) / "pope", tmp_path / "pope")
    labels = tmp_path / "pope/coco/coco_pope_random.json"
    labels.write_text(labels.read_text().replace("windmill", "sundial"))
    answers = tmp_path / "pope/answers/clean.jsonl"
    assert cli.main(["score", "pope", "--root", str(tmp_path), "--answers", str(answers)]) == 2
    assert "question 10000001 " in capsys.readouterr().err
    # Without the question file it is made from the labels, and the answers' own prompts tell.
    (tmp_path / "pope/llava_pope_test.jsonl").unlink()
    assert cli.main(["score", "pope", "--root", str(tmp_path), "--answers", str(answers)]) == 1
    assert "unknown question 10000001 " in capsys.readouterr().out


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.parent.name)
def test_scienceqa_traps(score, path):
    table, run = asker(score, path, "scienceqa")
    assert scored(run("trap-int-ids")) == scored(run("clean"))
    refused(run("trap-duplicate"), "duplicate answer")
    refused(run("trap-partial"), "has no answer")
    refused(run("trap-no-image-answers"), "has no answer")
    status, report = run("trap-no-image-answers", "--partial")
    assert status == 1 and report["headline"] is None and report["metrics"]["accuracy"] is not None
    status, report = run("trap-duplicate", "--partial")
    assert report["metrics"]["accuracy"] == pytest.approx(table["trap-duplicate"]["upstream"]["accuracy"])


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_traps(score, name):
    for path in SETS:
        (table, run), root = asker(score, path, name), root_of(path)
        refused(run("trap-duplicate"), "duplicate")
        refused(run("trap-partial"), "has no answer")
        refused(run("trap-unknown-id"), "unknown")
        partial = run("trap-partial", "--partial")[1]
        assert partial["answered"] < partial["expected"] and partial["metrics"]["vanilla"] is not None
        complete = {sample.unit for sample in benchmarks.get(name).load(root)}
        for problem in (problem for problem in partial["problems"] if "has no answer" in problem):
            complete.discard(str(int(problem.split("question ")[1].split(" ")[0]) % 1_000_000))
        assert (partial["headline"] is not None) == bool(complete)  # circular is over whole groups
        later = run("trap-duplicate", "--partial")[1]
        want = table["trap-duplicate"]["upstream"]["exact_match_eval"]
        assert later["metrics"]["circular"] == pytest.approx(100 * want["circular_overall"])


def test_seed_traps(score):
    for path in SETS:
        table, root = EXPECTED[path]["secondary"]["cases"], root_of(path)
        wrong = scored(score("seed", root, [root / table["seed_bench-trap-type-all-wrong"]["answers"]]))
        assert 0 in wrong["by_type"].values()
        refused(score("seed", root, [root / table["seed_bench-trap-missing"]["answers"]]), "has no answer")


def test_options_that_look_like_missing_values():
    folder = root_of(HERE) / "mmbench"
    load, prompt = mmbench.BENCHMARK.load, mmbench.BENCHMARK.prompt
    first, second = load(folder, folder / "trap_none.tsv")
    assert prompt(first).startswith("Trap 0?\nA. None\nB. one\nC. two\nD. three\n")
    assert second.options == ("red", "N/A", "blue", "null")
    numeric = load(folder, folder / "trap_numeric.tsv")
    assert numeric[0].options == ("1", "2", "3", "4")


# --- bad input, files of several kinds ---


@pytest.mark.parametrize(
    "name, gone, answers",
    [
        ("vqav2", "vqav2/v2_mscoco_test2015_annotations.json", "vqav2/answers/*/synth-7b-clean/*.jsonl"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "textvqa/answers/clean.jsonl"),
        ("pope", "pope/coco/coco_pope_random.json", "pope/answers/clean.jsonl"),
        ("mme", "MME/MME_Benchmark_release_version", "MME/answers/clean.jsonl"),
        ("scienceqa", "scienceqa/problems.json", "scienceqa/answers/clean.jsonl"),
        ("gqa", "gqa/data/testdev_balanced_questions.json", "gqa/answers/*/*/1_0.jsonl"),
        ("seed", "seed_bench/SEED-Bench.json", "seed_bench/answers/synth-7b/1_0.jsonl"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "mmbench/answers/*/clean.jsonl"),
    ],
)
def test_missing_labels_are_named(name, gone, answers, tmp_path, capsys):
    folder = gone.partition("/")[0]
    shutil.copytree(root_of(HERE) / folder, tmp_path / folder)
    (tmp_path / gone).rename(tmp_path / "away")
    files = sorted(map(str, tmp_path.glob(answers)))
    assert files and cli.main(["score", name, "--root", str(tmp_path), "--answers", *files]) == 2
    word = "annotations.json" if name == "vqav2" else Path(gone).name[:9]
    assert word in capsys.readouterr().err


def test_misspelt_names(tmp_path, capsys):
    assert cli.main(["score", "pope", "--root", str(root_of(HERE)), "--answers", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert cli.main(["score", "pop", "--answers", "x"]) == 2
    assert "Did you mean pope" in capsys.readouterr().err


def test_rows_that_are_no_answers(score, tmp_path):
    root = root_of(HERE)
    good = (root / "gqa/answers/llava_gqa_testdev_balanced/synth-7b/1_0.jsonl").read_text().splitlines()
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf"
        + good[0].encode()
        + b"\r\n\r\n[1, 2]\n"
        + good[1].encode()
        + b'\n{"question_id": 5}\n'
        b'{"question_id": "700100202", "text": null}\n' + good[2].encode() + b"\n" + good[3].encode()[:-9]
    )
    report = refused(score("gqa", root, [file]))
    assert [problem.split(": ")[0] for problem in report["problems"][:4]] == [
        f"{file}:{n}" for n in (3, 5, 6, 8)
    ]
    assert report["answered"] == 3  # byte order mark, CRLF and blank lines are no problem


def test_question_files_are_made_again(tmp_path, capsys):
    """MME from the txt files, POPE from the labels, ScienceQA and GQA from their annotations."""
    shutil.copytree(root_of(HERE), tmp_path, dirs_exist_ok=True)
    release = tmp_path / "MME/MME_Benchmark_release_version"
    asked = [json.loads(line) for line in (tmp_path / "MME/llava_mme.jsonl").open()]
    for row in asked:
        (release / row["image"]).parent.mkdir(exist_ok=True)
        (release / row["image"]).touch()
    made = {
        "MME/llava_mme.jsonl": lambda text: sorted(text.splitlines()),
        "pope/llava_pope_test.jsonl": str.splitlines,
        "scienceqa/llava_test_CQM-A.json": json.loads,
        "gqa/llava_gqa_testdev_balanced.jsonl": str.splitlines,
    }
    before = {name: (tmp_path / name).read_text() for name in made}
    for name in made:
        (tmp_path / name).unlink()
    samples = {name: benchmarks.get(name).load(tmp_path) for name in ("mme", "pope", "scienceqa", "gqa")}
    assert (
        cli.main(["doctor", "eval", "mme", "pope", "scienceqa", "gqa", "--root", str(tmp_path), "--rebuild"])
        == 1
    )
    out = capsys.readouterr().out
    assert "12 rows instead of 3,000" in out and "gqa/data/images  missing" in out
    for name, parse in made.items():
        assert parse((tmp_path / name).read_text()) == parse(before[name]), name
    for name, without_file in samples.items():
        again = benchmarks.get(name).load(tmp_path)
        assert {(s.id, s.text, s.image) for s in again} == {(s.id, s.text, s.image) for s in without_file}


def test_mme_is_scored_without_its_images(score, tmp_path, capsys):
    """The labels and the answers are enough, even where the question file is missing; asking needs more."""
    shutil.copytree(root_of(HERE) / "MME", tmp_path / "MME")
    answers = tmp_path / "MME/answers/messy.jsonl"
    whole = scored(score("mme", tmp_path, [answers]))
    (tmp_path / "MME/llava_mme.jsonl").unlink()
    for image in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        image.unlink()
    assert scored(score("mme", tmp_path, [answers])) == whole
    assert cli.main(["doctor", "eval", "mme", "--root", str(tmp_path), "--rebuild"]) == 1
    assert "cannot be made" in capsys.readouterr().out and not (tmp_path / "MME/llava_mme.jsonl").exists()


def test_scienceqa_ids_of_either_type(score, tmp_path):
    """Also in the question file and the split."""
    shutil.copytree(root_of(HERE) / "scienceqa", tmp_path / "scienceqa")
    answers = tmp_path / "scienceqa/answers/messy.jsonl"
    whole = scored(score("scienceqa", tmp_path, [answers]))
    for name in ("llava_test_CQM-A.json", "pid_splits.json"):
        table = json.loads((tmp_path / "scienceqa" / name).read_text())
        if name == "pid_splits.json":
            table = {split: [int(x) for x in ids] for split, ids in table.items()}
        else:
            table = [row | {"id": int(row["id"])} for row in table]
        (tmp_path / "scienceqa" / name).write_text(json.dumps(table))
        assert scored(score("scienceqa", tmp_path, [answers])) == whole


def test_protocols():
    textvqa = benchmarks.get("textvqa")
    samples = textvqa.load(root_of(HERE))
    for sample in samples:
        assert textvqa.prompt(sample) == textvqa.prompt(sample, "ocr") == sample.text
        bare = textvqa.prompt(sample, "no-ocr")
        assert "OCR" not in bare and len(bare.split("\n")) == 2
    answered = {row["prompt"] for row in json_lines(root_of(HERE) / "textvqa/answers/noocr.jsonl")}
    assert answered == {textvqa.prompt(sample, "no-ocr") for sample in samples}


def test_reviews_without_scores(score, tmp_path):
    reviews = tmp_path / "reviews.jsonl"
    rows = [
        {"question_id": n, "category": "llava_bench_conv", "content": c}
        for n, c in enumerate(("8, 6\n", "Sorry."))
    ]
    reviews.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(score("llava-bench", tmp_path, [reviews]), ":2: the judge gave no two scores to question 1")
    answers = root_of(HERE) / "mm-vet/answers/clean.jsonl"
    assert score("llava-bench", tmp_path, [answers])[0] == 2


def test_mm_vet_grades(score, tmp_path):
    grades = {f"v1_{n}": {"score": scores} for n, scores in enumerate(([1.0, 0.5], [0.0], 0.3))}
    file = tmp_path / "grades.json"
    file.write_text(json.dumps(grades))
    metrics = scored(score("mm-vet", root_of(HERE), [file]))
    assert metrics["total"] == pytest.approx(100 * (0.75 + 0 + 0.3) / 3)
    grades["v1_2"] = {"score": "?"}
    file.write_text(json.dumps(grades))
    refused(score("mm-vet", root_of(HERE), [file]), "v1_2 has no score")


def test_chunks_of_two_runs(score, tmp_path):
    """A stale chunk of an earlier run fits by its ids; its provenance gives it away."""
    case = EXPECTED[HERE]["vqav2"]["cases"]["clean"]
    files = []
    for index, file in enumerate(files_of(HERE, case)):
        files.append(tmp_path / file.name)
        shutil.copy(file, files[-1])
        run = {"model": "m", "reducer": "none" if index == 1 else "prumerge+", "chunk": f"{index} of 3"}
        files[-1].with_suffix(".provenance.json").write_text(json.dumps({"run": run}))
    refused(
        score("vqav2", root_of(HERE), files),
        "3_1.jsonl: of another run than",
        "'prumerge+' there, 'none' now",
    )
    files[1].with_suffix(".provenance.json").unlink()
    scored(score("vqav2", root_of(HERE), files))


def test_interval_covers_like_the_normal_one(tmp_path, score):
    """GQA with 400 one-question images, half right: the interval is that of a binomial mean."""
    folder = tmp_path / "gqa"
    (folder / "data").mkdir(parents=True)
    table = {str(n): {"question": f"q{n}?", "imageId": f"n{n}", "answer": "yes"} for n in range(400)}
    (folder / "data/testdev_balanced_questions.json").write_text(json.dumps(table))
    answers = tmp_path / "a.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": n, "text": "no" if int(n) % 2 else "Yes."}) + "\n" for n in table)
    )
    (low, high), again = (score("gqa", tmp_path, [answers])[1]["headline"]["interval"] for _ in range(2))
    assert [low, high] == again
    assert low == pytest.approx(50 - 4.9, abs=0.7) and high == pytest.approx(50 + 4.9, abs=0.7)
    # The same questions on 40 images that are wholly right or wholly wrong: fewer independent draws, wider.
    for n, entry in table.items():
        entry["imageId"] = f"n{int(n) // 10}"
    (folder / "data/testdev_balanced_questions.json").write_text(json.dumps(table))
    text = {n: "no" if int(n) // 10 % 2 else "yes" for n in table}
    answers.write_text("".join(json.dumps({"question_id": n, "text": text[n]}) + "\n" for n in table))
    low, high = score("gqa", tmp_path, [answers])[1]["headline"]["interval"]
    assert low == pytest.approx(50 - 15.5, abs=2.5) and high == pytest.approx(50 + 15.5, abs=2.5)


def test_scoring_imports_neither_torch_nor_transformers():
    answers = root_of(HERE) / "pope/answers/clean.jsonl"
    code = (
        "import sys; from llava.cli import main;"
        f"arguments = ['--root', {str(root_of(HERE))!r}, '--answers', {str(answers)!r}];"
        "assert main(['score', 'pope', *arguments]) == 0;"
        "assert not {'torch', 'transformers', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("POPE: f1 ")


# --- files of another shape ---


def edit_json(edit):
    """A change of a JSON file: `edit(content)` returns the new one."""
    return lambda data: json.dumps(edit(json.loads(data))).encode()


def edit_line(**change):
    """A change of the second line of a JSON Lines file; None deletes a key."""

    def change_line(data):
        lines = data.decode().splitlines()
        row = json.loads(lines[1]) | change
        lines[1] = json.dumps({key: value for key, value in row.items() if value is not None})
        return "\n".join(lines).encode()

    return change_line


def without_answers(table):
    for answer in table["annotations"][2]["answers"]:
        del answer["answer"]
    return table


VQAV2 = "vqav2/v2_mscoco_test2015_annotations.json"
MMBENCH = "mmbench/mmbench_dev_20230712.tsv"
COUNT = "MME/MME_Benchmark_release_version/count/syn_count_000.txt"
SCIENCE, SEED = "scienceqa/problems.json", "seed_bench/SEED-Bench.json"
DAMAGES = [
    # benchmark, file, what is done to it, what the sentence says beside its name
    ("vqav2", VQAV2, edit_json(without_answers), "[2]"),
    ("mme", "MME/llava_mme.jsonl", edit_line(text=None), ":2: "),
    ("mme", COUNT, lambda data: data.replace(b"\t", b" "), ":1: "),
    ("pope", "pope/coco/coco_pope_popular.json", lambda data: data[:-20], ":12: "),
    ("pope", "pope/coco/coco_pope_popular.json", lambda data: b'{"a":' + b"[" * 100_000, ":1: "),
    ("scienceqa", SCIENCE, edit_json(lambda table: table | {"7": table["7"] | {"answer": 9}}), "9"),
    ("mmbench", MMBENCH, lambda data: data[:300] + b"\xff" + data, "utf-8"),
    ("mmbench", MMBENCH, lambda data: data.replace(b"index", b"number", 1), "index"),
    ("gqa", "gqa/data/testdev_balanced_questions.json", edit_json(lambda x: x | {"700100201": None}), "null"),
    ("seed", SEED, edit_json(lambda table: table | {"question_type": {}}), "question_type"),
]


@pytest.mark.parametrize("name, path, change, word", DAMAGES)
def test_a_file_of_another_shape_is_one_sentence_that_names_it(name, path, change, word, tmp_path, capsys):
    folder = path.partition("/")[0]
    shutil.copytree(root_of(HERE) / folder, tmp_path / folder)
    file = tmp_path / path
    file.chmod(0o644)
    file.write_bytes(change(file.read_bytes()))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": 1, "text": "yes"}\n')
    for more in ([], ["--partial"]):
        assert cli.main(["score", name, "--root", str(tmp_path), "--answers", str(answers), *more]) == 2
        out, err = capsys.readouterr()
        assert not out and str(file) in err and word in err and len(err.splitlines()) == 1


# --- a part of a benchmark ---


@pytest.mark.parametrize("name, folder", [("gqa", "gqa"), ("textvqa", "textvqa"), ("mme", "MME")])
def test_a_part_is_scored_over_what_was_asked(name, folder, tmp_path):
    """As a set that holds nothing else, though the file may answer more; MME's and TextVQA's ids repeat."""
    benchmark, root = benchmarks.get(name), root_of(HERE)
    samples = benchmark.load(root)
    (answers,) = sorted((root / folder).rglob("answers/**/1_0.jsonl")) or [
        root / folder / "answers/clean.jsonl"
    ]
    rows, _ = benchmark.read([answers])
    joined, _ = benchmark.join(samples, rows)
    alone = benchmark.score(samples[:3], [row.text for row in joined[:3]])
    report = score_of(benchmark, root, [answers], limit=3)
    assert report["partial"]
    assert (report["expected"], report["answered"], report["metrics"]) == (3, 3, alone["metrics"])
    assert "partial" not in score_of(benchmark, root, [answers], limit=len(samples))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(answers.read_text().splitlines(keepends=True)[:2]))
    report = score_of(benchmark, root, [few], limit=3)
    assert report["headline"] is None and len(report["problems"]) == 1
