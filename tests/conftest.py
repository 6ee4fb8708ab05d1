"""Fixtures shared by all tests: one thread, no network, and the way to the reference data."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several threads only wait here
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the reference implementation, kept beside the project; skips where they are absent."""
    path = ROOT.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.skip(f"no reference data at ../shared/golden (looked for {path})")
    return path
