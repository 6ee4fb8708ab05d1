"""Tests of the vLLM plug-in: `bash scripts/test_vllm.sh`. They need vLLM, so they are not in `tests`."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before torch or vllm is imported. One thread each: an engine and what it is compared with run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest

ROOT = Path(__file__).resolve().parent.parent
LORA, BASE = ROOT / "checkpoints/mini-lora", ROOT / "checkpoints/mini-base"
PICTURES = ROOT / "playground/pictures"
SMALL = ["--model-path", str(LORA), "--model-base", str(BASE), "--dtype", "float32"]
DEFAULT = "prumerge+(max_tokens=144)"
KEY = "of-the-tests"

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server of the small model, a LoRA checkpoint; it has been started, which takes it a minute."""
    if not BASE.is_dir():
        pytest.skip("checkpoints/mini-base is missing: `llava mini prepare` builds it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llava.cli", "serve", *SMALL, "--reducer", DEFAULT, "--api-key", KEY]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", "--gpu-memory-utilization", "0.05"]
    environment = dict(os.environ)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"):
        environment.pop(name)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment)
    yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", log=log)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)


@pytest.fixture(scope="session")
def mini():
    """(tokenizer, model, image processor) of the small model, by our own loader, in float32."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(LORA, BASE, device="cpu", device_map="cpu", dtype="float32")[:3]


@pytest.fixture(scope="session")
def pictures() -> dict:
    """Five pictures: {file name: RGB image}."""
    from llava.mm_utils import load_image

    return {file.name: load_image(file) for file in sorted(PICTURES.glob("*.jpg"))}
