"""Fixtures shared by all tests: one thread, no network, and the way to the reference data."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several threads only wait here
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parent.parent


LONGEST = "test_train_distributed.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: a worker that begins it last leaves the others idle."""
    items.sort(key=lambda item: item.path.name != LONGEST)


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


@pytest.fixture(scope="session", params=["copy", "golden"])
def text_data(request: pytest.FixtureRequest) -> Path:
    """Reference data about text, twice: the few cases kept in tests/data/text, then all of them beside us.

    A folder with the JSON files and, in `tokenizers/`, the tokenizers they were made with.
    """
    if request.param == "copy":
        return ROOT / "tests" / "data" / "text"
    return request.getfixturevalue("golden_text")


@pytest.fixture(scope="session")
def golden_text(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same layout as tests/data/text, made of links into the reference data."""
    folder = tmp_path_factory.mktemp("golden_text")
    for file in (golden / "llava" / "text").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "tokenizers").symlink_to(golden / "llava" / "tokenizers")
    return folder
