"""Answers files under fire: kills at any byte, several processes, torn lines, other runs."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from llava.errors import UserError
from llava.eval.provenance import Files
from llava.eval.store import AnswersFile

LINES = [
    {"question_id": n // 2 if n % 5 else "v1", "prompt": f"question {n // 3}", "text": ""} for n in range(60)
]
"""Ids that repeat, of two types, prompts that repeat; some questions differ only in their order."""

FORK = multiprocessing.get_context("fork")
RUN = {"model": "m", "reducer": "prumerge+", "generation": {"temperature": 0.0}}


def row(index: int) -> dict:
    line = LINES[index]
    text = f"answer {line['question_id']} {line['prompt']}"
    return {**line, "text": text, "answer_id": random.Random(time.time_ns()).getrandbits(64)}


def work(answers: Path, rank: int = 0, world: int = 1, pause: float = 0.0) -> None:
    """What a process of a run does: its share of what has no answer yet, equal questions in one share."""
    with AnswersFile(answers, LINES, None if world == 1 else rank) as file:
        Files(answers).agree(RUN)
        done = file.answered()
        for index in range(len(LINES)):
            if index // 3 % world == rank and index not in done:
                time.sleep(pause * random.random())
                file.append(row(index))


def merge(answers: Path) -> None:
    with AnswersFile(answers, LINES) as file:
        file.merge()


def check(answers: Path) -> None:
    """Every question once, every line whole, no part left."""
    text = answers.read_text()
    assert text.endswith("\n") and Files(answers).parts == []
    got = sorted((str(r["question_id"]), r["prompt"], r["text"]) for r in map(json.loads, text.splitlines()))
    assert got == sorted((str(r["question_id"]), r["prompt"], r["text"]) for r in map(row, range(len(LINES))))


class Killed(BaseException):
    pass


def test_a_thousand_kills(tmp_path, monkeypatch):
    """The process dies after any number of bytes it wrote, or before a file is deleted; then starts again, as
    one of one, two or three processes."""
    generator = random.Random(1)
    write, unlink = os.write, os.unlink
    kills = finished = left = 0

    def dying_write(descriptor, data):
        nonlocal left
        if len(data) >= left:
            write(descriptor, bytes(data)[:left])
            raise Killed
        left -= len(data)
        return write(descriptor, data)

    def dying_unlink(path, **options):
        nonlocal left
        left -= 50
        if left < 0:
            raise Killed
        unlink(path, **options)

    monkeypatch.setattr(os, "write", dying_write)
    monkeypatch.setattr(os, "unlink", dying_unlink)
    answers = tmp_path / "0" / "a.jsonl"
    while kills < 1000:
        left = generator.choice([1, 20, 200, 2000, 9000]) + generator.randrange(300)
        world = generator.choice([1, 2, 3])
        try:
            for rank in range(world):
                work(answers, rank, world)
            merge(answers)
            check(answers)
            finished += 1
            answers = tmp_path / str(finished) / "a.jsonl"
        except Killed:
            kills += 1
    assert finished > 20


def test_real_kills_of_processes_that_share_the_work(tmp_path):
    """SIGKILL, some or all processes of a run; the next command has another number of them."""
    generator = random.Random(2)
    kills, runs = 0, 0
    while kills < 12:
        runs += 1
        answers = tmp_path / str(runs) / "a.jsonl"
        finished = False
        while not finished:
            world = generator.choice([1, 2, 3])
            running = [FORK.Process(target=work, args=(answers, n, world, 0.01)) for n in range(world)]
            for process in running:
                process.start()
            until = lines_of(answers) + generator.randrange(3, 40)
            while lines_of(answers) < until and any(process.is_alive() for process in running):
                time.sleep(0.001)
            if kills < 12:
                for victim in running[: generator.randrange(1, world + 1)]:
                    kills += victim.is_alive()
                    victim.kill()
            for process in running:
                process.join()
            finished = all(process.exitcode == 0 for process in running)
        merge(answers)
        check(answers)


def lines_of(answers: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in [answers, *Files(answers).parts] if file.exists())


def test_a_question_two_processes_answered_counts_once(tmp_path):
    answers = tmp_path / "a.jsonl"
    work(answers, 0, 2)
    with AnswersFile(answers, LINES, 7) as other:  # of another command, at the same time
        for index in range(20):
            other.append(row(index))
    work(answers, 1, 2)
    merge(answers)
    check(answers)


def test_a_file_that_another_process_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(AnswersFile, "WAIT_SECONDS", 0.2)
    answers = tmp_path / "a.jsonl"
    for part in (None, 0):
        with AnswersFile(answers, LINES, part), pytest.raises(UserError, match=r"a\.(jsonl|part0)"):
            AnswersFile(answers, LINES, part)
        with AnswersFile(answers, LINES, part) as file:  # and taken when that one has ended
            assert file.answered() == {}


@pytest.mark.parametrize("change", [{"reducer": "none"}, {"generation": {"seed": 1}}, {"protocol": "crop"}])
def test_another_run_is_refused_and_what_differs_is_named(tmp_path, change):
    files = Files(tmp_path / "a.jsonl")
    files.agree(RUN)
    with pytest.raises(UserError, match=next(iter(change))):
        files.agree(RUN | change)
    files.agree(dict(reversed(RUN.items())))


def test_files_that_do_not_fit_are_refused(tmp_path):
    answers = tmp_path / "a.jsonl"
    answers.write_text(json.dumps(row(0)) + "\n")
    with pytest.raises(UserError, match=r"a\.provenance\.json"):
        Files(answers).agree(RUN)
    once = next(n for n, line in enumerate(LINES) if LINES.count(line) == 1)
    for content, where in (
        ('{"question_id": 999, "prompt": "x", "text": "y"}\n', ":1: question 999"),
        (2 * (json.dumps(row(once)) + "\n"), ":2: question"),
        (json.dumps(row(1)) + '\n{"question_id": 1, "pro\n' + json.dumps(row(9)) + "\n", ":2 "),
    ):
        answers.write_text(content)
        with AnswersFile(answers, LINES) as file, pytest.raises(UserError, match="--overwrite") as error:
            file.answered()
        assert where in str(error.value)
    Files(answers).remove()
    assert list(tmp_path.iterdir()) == []
