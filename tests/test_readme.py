"""What the pages say can be done: their commands parse with the real parsers, their paths exist."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

BUILT = (
    "scripts/v1_5/eval/colors.sh",
    "checkpoints/mini-base",
    "checkpoints/llava-",
    "playground/data/",
    "outputs/",
)
"""Paths that a command makes or a user brings."""

PATH = re.compile(r"(?<![\w/.-])(?:llava|scripts|docs|playground|checkpoints|tests|\.ci)/[\w./+*-]*")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def code_lines(page: Path) -> list[str]:
    """Lines of fenced blocks without a language (or of a shell's), and of indented ones; joined at a \\."""
    lines, fence = [], None
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
        elif fence in ("", "bash", "sh", "console") or (fence is None and line.startswith("    ")):
            lines.append(line.strip().removeprefix("$ "))
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def spans(page: Path) -> list[str]:
    """Inline code, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def words_of(line: str) -> tuple[list[str], list[str]]:
    """A command's words, and the names of what is set in front of it."""
    words = shlex.split(line, comments=True)
    for end in (">", "|", "&&", ";"):
        if end in words:
            words = words[: words.index(end)]
    names = []
    while words and ASSIGNMENT.fullmatch(words[0]):
        names.append(words.pop(0).partition("=")[0])
    return words, names


def commands(lines: list[str]) -> list[list[str]]:
    """The words after `llava`, of each line that is such a command."""
    found = [words_of(line)[0] for line in lines if re.match(r"(?:[A-Z_]+=\S* )*llava ", line)]
    return [words[1:] for words in found]


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser that reads a command's flags, and the words it gets."""
    name = cli.command_of(words)
    assert name is not None, cli.no_such_command(words)
    module = {"train": "llava.train.arguments", "serve": "llava.serve.server"}.get(name)
    parser = cli.build_parser(name) if module is None else importlib.import_module(module).build_parser()
    return parser, words[len(name.split()) :]


class Parsed(BaseException):
    """The flags of a script are read."""


def parse(words: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command itself read its flags and settings; SystemExit where it does not take them."""
    if words[0] == "llava":
        parser, rest = parser_of(words[1:])
        if words[1] == "serve":
            parser.parse_known_args(rest)  # vLLM has flags of its own
        else:
            parser.parse_args(rest)
    elif words[0] == "python" and words[1].startswith("scripts/"):
        real = argparse.ArgumentParser.parse_args

        def read_and_stop(self, *args) -> None:
            real(self, *args)
            raise Parsed

        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    elif words[0] == "bash" and words[1].startswith("scripts/v1_5/"):
        shown = subprocess.run(
            ["bash", ROOT / words[1], "--help"], capture_output=True, text=True, check=True
        )
        known = shown.stdout.split()
        assert not words[2:] and set(names) <= set(known), f"{shlex.join(words)}: {names}"


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_are_taken(page, monkeypatch, capsys):
    """Those in running text too where they are scripts', which need no flag."""
    wrong = []
    scripts = [span for span in spans(page) if "scripts/" in span]
    for line in [*code_lines(page), *scripts]:
        if re.match(r"(?:[A-Z_]+=\S* )*(?:llava|python|bash) ", line):
            try:
                parse(*words_of(line), monkeypatch)
            except (SystemExit, AssertionError) as error:
                said = capsys.readouterr().err.splitlines()
                wrong.append(f"{line}\n  {said[-1] if said else error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_in_the_text_exist(page):
    """A command in running text may leave out what it needs, but what it names is there."""
    wrong = []
    for words in commands(spans(page)):
        parser, rest = parser_of(words)
        if words[0] == "serve":  # which hands vLLM the flags of vLLM
            continue
        known = {option for action in parser._actions for option in action.option_strings}
        given = {word.split("=")[0].strip("[]") for word in rest if word.strip("[]").startswith("--")}
        wrong += [f"llava {shlex.join(words)}: no {flag}" for flag in sorted(given - known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text)
    local = [target for target in links if not re.match(r"\w+:", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    for word in sorted(
        {match.rstrip(".") for match in PATH.findall(" ".join([*code_lines(page), *spans(page)]))}
    ):
        if word.startswith(BUILT) or (page.parent / word).exists():
            continue
        if not list(ROOT.glob(word)):
            missing.append(word)
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_imports_in_python_blocks(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llava":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {', '.join(missing)}"


def test_the_pages_hold_something_to_test():
    """The reading above would be silent if it found nothing."""
    assert len(commands(code_lines(ROOT / "README.md"))) >= 2
    assert len(commands(spans(ROOT / "README.md"))) >= 5
