"""Tests of the vLLM plug-in: `bash scripts/test_vllm.sh`. They need vLLM, so they are not in `tests`."""

import importlib.util
import os
from pathlib import Path

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

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def mini():
    """(tokenizer, model, image processor) of the small model, by our own loader, in float32."""
    from llava.model.builder import load_pretrained_model

    if not BASE.is_dir():
        pytest.skip("checkpoints/mini-base is missing: `llava mini prepare` builds it")
    return load_pretrained_model(LORA, BASE, device="cpu", device_map="cpu", dtype="float32")[:3]


@pytest.fixture(scope="session")
def mini_merged(mini, tmp_path_factory) -> Path:
    """The small model as one whole checkpoint, which is what vLLM can read."""
    from llava.model.checkpoints import save_full

    tokenizer, model, _ = mini
    folder = tmp_path_factory.mktemp("merged") / "mini-merged"
    model.config.mm_vision_tower = str(BASE / "vision_tower")
    save_full(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> dict[str, tuple]:
    """Five pictures with a question each: {file name: (RGB image, question)}."""
    import json

    from llava.mm_utils import load_image

    folder = ROOT / "playground/pictures"
    questions = json.loads((folder / "questions.json").read_text())
    return {name: (load_image(folder / name), question) for name, question in questions.items()}
