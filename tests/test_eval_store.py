"""Answers files under fire: kills at any byte, processes that die and others that take over, other runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.errors import UserError
from llava.eval.store import Question, Store, unit_size, units_of

QUESTIONS = [Question(n // 2 if n % 5 else "v1", f"question {n // 3}", n // 4) for n in range(60)]
"""Ids that repeat, of two types, prompts that repeat, units of four; some differ only in their order."""

RUN = {"model": "m", "reducer": "prumerge+", "generation": {"temperature": 0.0}}


def text_of(question):
    return f"answer {question.id} {question.prompt}"


def row(index):
    question = QUESTIONS[index]
    return {
        "question_id": question.id,
        "prompt": question.prompt,
        "text": f"answer {question.id} {question.prompt}",
    }


def work(store, on_unit=lambda unit: None):
    while store.open_questions:
        for unit in store.claims():
            for index in store.pending(unit):
                store.write({index: row(index)})
            on_unit(unit)
            store.release(unit)
        if store.open_questions:
            store.wait()


def check(answers, questions=QUESTIONS):
    """Every question once, every line whole."""
    text = answers.read_text()
    assert text.endswith("\n")
    got = sorted((str(r["question_id"]), r["prompt"], r["text"]) for r in map(json.loads, text.splitlines()))
    assert got == sorted((str(q.id), q.prompt, text_of(q)) for q in questions)


def test_units_hold_whole_groups():
    generator = random.Random(0)
    for _ in range(200):
        groups = [str(generator.randrange(12)) for _ in range(generator.randrange(1, 60))]
        size = generator.randrange(1, 20)
        units = units_of(groups, size)
        assert len({(g, u) for g, u in zip(groups, units, strict=True)}) == len(set(groups))
        sizes = [units.count(unit) for unit in range(max(units) + 1)]
        largest = max(map(groups.count, groups))
        assert all(size <= n < size + largest for n in sizes[:-1]) and sizes[-1] > 0
    assert [unit_size(n) for n in (1, 2_374, 8_910, 107_394)] == [32, 37, 139, 256]
    assert [unit_size(n, 8) for n in (1, 60, 2_374, 8_910, 107_394)] == [1, 1, 37, 139, 256]


class Killed(BaseException):
    pass


def test_a_thousand_kills(tmp_path, monkeypatch):
    """The process dies after any number of bytes it wrote, wherever to; then starts again."""
    generator = random.Random(1)
    write, replace = os.write, os.replace
    kills = finished = 0
    left = 0  # bytes until death

    def dying_write(descriptor, data):
        nonlocal left
        if len(data) >= left:
            write(descriptor, bytes(data)[:left])
            raise Killed
        left -= len(data)
        return write(descriptor, data)

    def dying_replace(source, target):
        nonlocal left
        if left < 30:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "write", dying_write)
    monkeypatch.setattr(os, "replace", dying_replace)
    folder = tmp_path / "0"
    while kills < 1000:
        left = generator.choice([1, 20, 200, 2000]) + generator.randrange(300)
        store = None
        try:
            store = Store(folder / "a.jsonl", QUESTIONS, RUN)
            work(store, lambda unit, store=store: store.note({"unit": unit}))
            finished += 1
            check(folder / "a.jsonl")
            folder = tmp_path / str(finished)
        except Killed:
            kills += 1
        finally:
            if store is not None:
                store.close()
    assert finished > 20


WORKER = f"""
import sys, random, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from llava.eval.store import Store
from test_eval_store import QUESTIONS, RUN, row
store = Store(Path(sys.argv[1]), QUESTIONS, RUN)
while store.open_questions:
    for unit in store.claims():
        for index in store.pending(unit):
            time.sleep(random.random() * 0.02)
            store.write({{index: row(index)}})
        store.release(unit)
    if store.open_questions:
        store.wait()
"""


def start(answers):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(answers)])


def test_real_kills_of_processes_that_share_the_work(tmp_path):
    """Three at a time; twenty of them die of SIGKILL, and what they had claimed goes to the others."""
    answers, generator = tmp_path / "a.jsonl", random.Random(2)
    running, kills, rounds = [], 0, 0
    while kills < 20:
        rounds += 1
        answers = tmp_path / str(rounds) / "a.jsonl"
        running = [start(answers) for _ in range(3)]
        while kills < 20 and any(process.poll() is None for process in running):
            time.sleep(generator.random() * 0.15)
            lines = answers.read_bytes().count(b"\n") if answers.exists() else 0
            alive = [process for process in running if process.poll() is None]
            if lines > 3 and lines < 50 and alive:
                victim = generator.choice(alive)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                kills += 1
                running[running.index(victim)] = start(answers)
        assert [process.wait() for process in running] == [0, 0, 0]
        check(answers)


def test_torn_last_line_is_cut(tmp_path):
    answers = tmp_path / "a.jsonl"
    work(first := Store(answers, QUESTIONS, RUN))
    first.close()
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-20])
    second = Store(answers, QUESTIONS, RUN)
    assert second.open_questions == 1
    work(second)
    second.close()
    check(answers)


def test_torn_line_of_another_process_is_cut_before_one_writes(tmp_path):
    answers = tmp_path / "a.jsonl"
    store = Store(answers, QUESTIONS, RUN)
    with open(answers, "ab") as other:  # a process that dies in the middle of its line
        other.write(json.dumps(row(7)).encode()[:30])
    work(store)
    store.close()
    check(answers)


def test_what_others_wrote_is_not_written_again(tmp_path):
    answers = tmp_path / "a.jsonl"
    store = Store(answers, QUESTIONS, RUN)
    assert next(claims := store.claims()) == 0
    with open(answers, "a") as other:
        other.writelines(json.dumps(row(index)) + "\n" for index in store.units[0])
    store.write({index: row(index) for index in store.units[0]})
    assert answers.read_text().count("\n") == len(store.units[0])
    assert next(claims) == 1
    store.close()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"reducer": "none"}, "reducer: 'prumerge+' there, 'none' now"),
        ({"generation": {"temperature": 0.2}}, "(generation.temperature: 0.0 there, 0.2 now)"),
        ({"protocol": "crop"}, "protocol: None there, 'crop' now"),
        (
            {"model": "n", "reducer": "topk"},
            "model: 'm' there, 'n' now; reducer: 'prumerge+' there, 'topk' now",
        ),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path, change, words):
    answers = tmp_path / "a.jsonl"
    Store(answers, QUESTIONS, RUN).close()
    with pytest.raises(UserError, match="belongs to another run") as error:
        Store(answers, QUESTIONS, RUN | change)
    assert words in str(error.value)
    Store(answers, QUESTIONS, dict(reversed(RUN.items()))).close()


def test_files_that_do_not_fit_are_refused(tmp_path):
    answers = tmp_path / "a.jsonl"
    answers.write_text(json.dumps(row(0)) + "\n")
    with pytest.raises(UserError, match=r"no a\.provenance\.json"):
        Store(answers, QUESTIONS, RUN)
    answers.unlink()
    Store(answers, QUESTIONS, RUN).close()
    for text, words in (
        ('{"question_id": 999, "prompt": "x", "text": "y"}\n', ":1: question 999 is not asked in this run"),
        (2 * (json.dumps(row(9)) + "\n"), None),
        (4 * (json.dumps(row(1)) + "\n"), "is answered twice"),
        (json.dumps(row(1)) + '\n{"question_id": 1, "pro\n' + json.dumps(row(9)) + "\n", ":2: "),
    ):
        answers.write_text(text)
        count = sum((q.id, q.prompt) == (QUESTIONS[9].id, QUESTIONS[9].prompt) for q in QUESTIONS)
        if words is None:
            words = None if count > 1 else "is answered twice"
        if words:
            with pytest.raises(UserError, match="Give another --answers file") as error:
                Store(answers, QUESTIONS, RUN)
            assert words in str(error.value)


def test_problems_are_kept_apart_and_tried_again(tmp_path):
    answers = tmp_path / "a.jsonl"
    store = Store(answers, QUESTIONS, RUN)
    for index in store.units[0]:
        store.fail(index, "the image is broken")
    assert 0 not in store.claims()  # not twice in one run
    assert answers.read_text() == ""
    store.close()
    onlooker = Store(answers, QUESTIONS, None)
    assert len(onlooker.problems) == len(onlooker.units[0])
    onlooker.close()
    again = Store(answers, QUESTIONS, RUN)
    assert again.open_questions == len(QUESTIONS)
    work(again)
    again.close()
    check(answers)
