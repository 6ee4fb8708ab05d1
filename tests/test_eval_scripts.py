"""Every shipped evaluation script: its commands are ones the command line takes, and its settings arrive."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from llava import cli
from llava.eval import benchmarks

SCRIPTS = Path(__file__).parents[1] / "scripts/v1_5/eval"
NAMES = sorted(file.stem for file in SCRIPTS.glob("*.sh") if file.stem not in ("common", "all"))


def commands(script, *flags, **settings):
    """The commands a script would run, as arguments of `llava`."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        ["bash", str(SCRIPTS / f"{script}.sh"), *flags],
        env={**kept, "DRY_RUN": "1", **settings},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stderr.splitlines() if " -m llava.cli " in line]
    assert all(line[1:3] == ["-m", "llava.cli"] for line in lines)
    return [line[3:] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_real(name):
    lines = commands(
        name, "--limit", "7", MODEL="a/b-7b", BASE="c/d", REDUCER="topk(tokens=64)", CONV="llava_v1"
    )
    assert len(lines) == 1  # nothing is submitted of a part
    args = cli.build_parser("eval").parse_args(lines[0][1:])
    assert (args.model_path, args.model_base, args.conv_mode, args.limit) == ("a/b-7b", "c/d", "llava_v1", 7)
    benchmark = benchmarks.get(args.benchmark)
    assert args.reducer == "topk(tokens=64)"
    folder = benchmark.files[0].path.split("/")[0]
    assert str(args.answers) == f"playground/data/eval/{folder}/answers/b-7b-topk(tokens=64).jsonl"
    for line in commands(name)[1:]:
        submit = cli.build_parser("submit").parse_args(line[1:])
        assert line[0] == "submit" and submit.benchmark == benchmark.name and benchmark.write is not None
    if benchmark.write is not None and name != "gqa":
        assert len(commands(name)) == 2


def test_there_is_one_for_every_benchmark():
    asked = {commands(name)[0][1] for name in NAMES}
    assert asked == set(benchmarks.BENCHMARKS)


def test_flags_win_over_settings():
    line = commands("pope", "--model-path", "mine", "--batch-tokens", "99", MODEL="a")[0]
    args = cli.build_parser("eval").parse_args(line[1:])
    assert (args.model_path, args.batch_tokens) == ("mine", 99)


def test_mini():
    asked = commands("all", "--limit", "3", MINI="1")
    args = [cli.build_parser("eval").parse_args(line[1:]) for line in asked[:-1]]
    assert [one.benchmark for one in args] == ["vqav2", "textvqa", "mme", "pope", "scienceqa", "mmbench"]
    assert {(one.model_path, one.model_base) for one in args} == {
        ("checkpoints/mini-lora", "checkpoints/mini-base")
    }
    assert {str(one.root) for one in args} == {"playground/data/eval-mini"}
    assert asked[-1][0] == "report" and cli.build_parser("report").parse_args(asked[-1][1:])


def test_help_names_the_settings():
    done = subprocess.run(["bash", str(SCRIPTS / "sqa.sh"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "PROTOCOL=crop" in done.stdout and "visual token reducer" in done.stdout


def test_all_runs_every_script():
    assert {line[1] for line in commands("all") if line[0] == "eval"} == set(benchmarks.BENCHMARKS)


def test_the_layout_page_says_what_the_benchmarks_declare():
    page = (Path(__file__).parents[1] / "playground/data/README.md").read_text()
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    declared = {
        (name, file.path): file for name in benchmarks.BENCHMARKS for file in benchmarks.get(name).files
    }
    listed = [[cell.strip(" `") for cell in row] for row in rows if row[0].strip() in benchmarks.BENCHMARKS]
    assert len(listed) >= 33
    for name, path, number, purpose, source in listed:
        file = declared[name, path]
        assert (f"{file.rows:,}" if file.rows else "", file.purpose) == (number, purpose)
        assert file.source.split(" ")[0] in source or "--rebuild" in source
