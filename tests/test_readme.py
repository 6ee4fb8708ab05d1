"""What the pages say can be done: their commands parse with the real parsers, their paths exist."""

import argparse
import ast
import importlib
import re
import shlex
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


def words_of(line: str) -> list[str]:
    """A command's words, without what is set in front of it."""
    words = shlex.split(line, comments=True)
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    for end in (">", "|", "&&", ";"):
        if end in words:
            words = words[: words.index(end)]
    return words


def commands(lines: list[str]) -> list[list[str]]:
    """The words after `llava`, of each line that is such a command."""
    found = [words_of(line) for line in lines if re.match(r"(?:[A-Z_]+=\S* )*llava ", line)]
    return [words[1:] for words in found]


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser that reads a command's flags, and the words it gets."""
    name = cli.command_of(words)
    assert name is not None, cli.no_such_command(words)
    rest = words[len(name.split()) :]
    return cli.build_parser(name), ["--", *rest] if name in cli.PASS_THROUGH else rest


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_blocks_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for words in commands(code_lines(page)):
        parser, rest = parser_of(words)
        try:
            parser.parse_args(rest)
        except SystemExit:
            wrong.append(f"llava {shlex.join(words)}\n  {capsys.readouterr().err.splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_in_the_text_exist(page: Path) -> None:
    """A command in running text may leave out what it needs, but what it names is there."""
    wrong = []
    for words in commands(spans(page)):
        parser, rest = parser_of(words)
        if rest[:1] == ["--"]:  # a command that reads its flags itself
            continue
        known = {option for action in parser._actions for option in action.option_strings}
        given = {word.split("=")[0].strip("[]") for word in rest if word.strip("[]").startswith("--")}
        wrong += [f"llava {shlex.join(words)}: no {flag}" for flag in sorted(given - known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page: Path) -> None:
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
def test_imports_in_python_blocks(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llava":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {', '.join(missing)}"


def test_the_pages_hold_something_to_test() -> None:
    """The reading above would be silent if it found nothing."""
    assert len(commands(code_lines(ROOT / "README.md"))) >= 2
    assert len(commands(spans(ROOT / "README.md"))) >= 5
