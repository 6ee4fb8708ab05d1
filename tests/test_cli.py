"""The `llava` command: its table, near names, exit statuses, and what it does not import."""

import importlib
import subprocess
import sys

import pytest

from llava import cli
from llava.errors import UserError, exit_status

WITHOUT_TORCH = ["score", "submit", "roofline", "chat", "eval", "doctor eval"]


# `llava train` hands its flags to the training parser, which has its own help (next test).
@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "train"])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*command.split(), "--help"])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    assert out.startswith(f"usage: llava {command} ")
    assert "--debug" in out
    assert callable(importlib.import_module(cli.COMMANDS[command][0]).run)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage_lists_everything(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert any(line.split() == [*name.split(), *summary.split()] for line in out.splitlines())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["scroe"], "score"),
        (["zzz"], "zzz"),
        (["mini"], "prepare"),
        (["mini", "wrold"], "world"),
        (["--model-path", "x"], "--model-path"),
    ],
)
def test_no_such_command(argv, says, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err and len(err.splitlines()) == 1


def test_flags_that_do_not_parse(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["chat", "--temperature", "warm"])
    assert left.value.code == 2 and "--temperature" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from llava.cli import build_parser\n"
        f"for command in {WITHOUT_TORCH}: build_parser(command).format_help()\n"
        "assert 'llava' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# How a command ends


def fails(error: BaseException):
    def command() -> int:
        raise error

    return command


def test_exit_status(capsys):
    assert exit_status(lambda: 1, name="x") == 1
    assert exit_status(fails(KeyboardInterrupt()), name="x") == 130
    capsys.readouterr()
    assert exit_status(fails(UserError("the cup is empty: fill it")), name="llava tea") == 2
    assert capsys.readouterr().err == "llava tea: the cup is empty: fill it\n"
    assert exit_status(fails(UserError("the cup is empty")), name="x", debug=True) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not dressed up as the user's
        exit_status(fails(ZeroDivisionError()), name="x")


def test_a_reader_that_has_left():
    """`llava ... | head`: no traceback, no complaint of the interpreter."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llava.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, b"")
