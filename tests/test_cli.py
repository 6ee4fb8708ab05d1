"""The `llava` command: its table, near names, exit statuses, and what it does not import."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

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


def test_help_of_training(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--lora_enable" in out and "--mm_token_reducer" in out


def test_table():
    """One or two words each; a first word is a command or a group of them, never both."""
    words = [name.split() for name in cli.COMMANDS]
    assert {len(parts) for parts in words} <= {1, 2}
    assert not {parts[0] for parts in words if len(parts) == 2} & set(cli.COMMANDS)
    assert all(summary and not summary.endswith(".") for _, summary in cli.COMMANDS.values())


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage_lists_everything(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert any(line.split() == [*name.split(), *summary.split()] for line in out.splitlines())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["scroe"], "Did you mean `score`?"),
        (["Chat"], "Did you mean `chat`?"),
        (["zzz"], "there is no command `zzz`. `llava --help`"),
        (["mini"], "`mini` needs one of prepare, world,"),
        (["mini", "wrold"], "`mini` needs one of prepare, world,"),
        (["--model-path", "x"], "there is no command `--model-path`"),
    ],
)
def test_no_such_command(argv, says, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv", [["score"], ["roofline", "--no-such-flag"], ["chat", "--temperature", "warm"]]
)
def test_flags_that_do_not_parse(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert f"llava {argv[0]}: error: " in capsys.readouterr().err


def test_two_words_reach_their_module(monkeypatch):
    seen = []
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--n", type=int),
        run=lambda args: seen.append(args) or 1,
    )
    monkeypatch.setitem(sys.modules, "a_module_of_a_test", module)
    monkeypatch.setattr(cli, "COMMANDS", {"try this": ("a_module_of_a_test", "nothing")})
    assert cli.main(["try", "this", "--n", "3"]) == 1
    assert (seen[0].n, seen[0].debug) == (3, False)


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
