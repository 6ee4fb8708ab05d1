"""Fixtures shared by all tests: one thread, no network, and the way to the reference data."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several threads only wait here
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

if TYPE_CHECKING:
    from tiny_checkpoints import Family

ROOT = Path(__file__).resolve().parent.parent


LONGEST = (
    *("test_train_distributed.py", "test_demo.py", "test_train.py", "test_tour.py"),
    *("test_eval_loop.py", "test_plug.py", "test_mini_model.py", "test_reducers.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a worker that begins one last leaves the others idle."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of training data stay out of the user's cache."""
    os.environ["LLAVA_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


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


@pytest.fixture(scope="session")
def tiny_once(tmp_path_factory: pytest.TempPathFactory) -> "Family":
    """Checkpoints of every kind; no test changes them."""
    from tiny_checkpoints import family

    return family(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def tiny(tiny_once: "Family", tmp_path: Path) -> "Family":
    """A copy that the test may change."""
    return tiny_once.copied_to(tmp_path)


@pytest.fixture(scope="session")
def mini(root: Path) -> tuple[Path, Path]:
    """The small model, (checkpoint, base); skips where `llava mini prepare` has not been run."""
    base = root / "checkpoints" / "mini-base"
    if not (base / "config.json").is_file():
        pytest.skip(f"{base} is missing: `llava mini prepare` builds it (scripts/test.sh does)")
    return root / "checkpoints" / "mini-lora", base
