"""Visual tokens on disk: the ones the model would have made, and never any other."""

import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import STAGES, Tiny, losses, make
from torch import Tensor

from llava.errors import UserError
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train import visual_cache
from llava.train.train import train
from llava.train.visual_cache import VisualCache, digest_of, recipe_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llava(tiny: Tiny) -> LlavaLlamaForCausalLM:
    _, model, _, _ = load_pretrained_model(
        str(tiny.models.full), None, "llava", device="cpu", reducer="prumerge"
    )
    return model.float()


FORK = multiprocessing.get_context("fork")


def refuse(problem: str) -> None:
    raise AssertionError(problem)


def fill(llava: LlavaLlamaForCausalLM, folder: Path, files: list[Path], **options) -> tuple[VisualCache, int]:
    cache = VisualCache(folder, recipe_of(llava))
    options = {"on_error": refuse, "show": False, "batch_size": 4, **options}
    return cache, cache.fill(files, llava, **options)


def pictures(tiny: Tiny) -> list[Path]:
    return sorted(tiny.images.glob("*.png"))


def encoded(llava: LlavaLlamaForCausalLM, file: Path) -> Tensor:
    pixels = process_images([Image.open(file)], llava.get_vision_tower().image_processor, llava.config)
    return llava.encode_images(pixels)[0]


def assert_right(cache: VisualCache, llava: LlavaLlamaForCausalLM, files: list[Path]) -> None:
    assert len(cache) == len(files)
    for file in files:
        tokens = cache[digest_of(file)]
        assert tokens.dtype == torch.float16
        torch.testing.assert_close(tokens.float(), encoded(llava, file), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("reducer", "batch_size"), [("none", 4), ("prumerge", 1), ("prumerge+", 4)])
def test_entries_are_what_the_model_makes(reducer, batch_size, llava, tiny, tmp_path):
    llava.set_reducer(reducer)
    files = pictures(tiny)
    cache, count = fill(llava, tmp_path, files, batch_size=batch_size)
    assert count == len(files)
    assert_right(cache, llava, files)
    assert fill(llava, tmp_path, files)[1] == 0
    assert_right(pickle.loads(pickle.dumps(cache)), llava, files)  # as a loader's worker gets it


def test_the_same_content_is_encoded_once(llava, tiny, tmp_path):
    file = pictures(tiny)[0]
    twin = tmp_path / "twin.png"
    shutil.copy(file, twin)
    cache, count = fill(llava, tmp_path / "cache", [file, twin, file])
    assert count == len(cache) == 1


def test_a_changed_picture_is_another_entry(llava, tiny, tmp_path):
    first, second = pictures(tiny)[:2]
    file = tmp_path / "picture.png"
    shutil.copy(first, file)
    stamp = os.stat(file)
    fill(llava, tmp_path / "cache", [file])
    shutil.copy(second, file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # not even by its time does it look changed
    cache = VisualCache(tmp_path / "cache", recipe_of(llava))
    assert digest_of(file) not in cache
    assert fill(llava, tmp_path / "cache", [file])[1] == 1


def change_weight(llava: LlavaLlamaForCausalLM) -> None:
    with torch.no_grad():
        next(llava.get_vision_tower().parameters()).view(-1)[0] += 1e-3


CHANGES = {
    "reducer": lambda llava: llava.set_reducer("prumerge(ratio=0.25)"),
    "tower's weights": change_weight,
    "layer": lambda llava: setattr(llava.get_vision_tower(), "select_layer", -3),
    "dtype": lambda llava: llava.get_vision_tower().to(torch.bfloat16),
    "aspect": lambda llava: setattr(llava.config, "image_aspect_ratio", "square"),
    "processor": lambda llava: setattr(llava.get_vision_tower().image_processor, "image_mean", [0.5] * 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_makes_other_tokens_has_other_entries(change, llava, tiny, tmp_path):
    files = pictures(tiny)[:1]
    fill(llava, tmp_path, files)
    CHANGES[change](llava)
    assert fill(llava, tmp_path, files)[1] == 1
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2


METHOD = """
from dataclasses import dataclass
from llava.reducers.registry import Reducer, register

@register("half")
@dataclass(frozen=True)
class Half(Reducer):
    def __call__(self, features):
        raise NotImplementedError
"""


def test_a_method_that_is_worked_on_has_other_entries(llava, tmp_path):
    (file := tmp_path / "half.py").write_text(METHOD)
    llava.set_reducer(f"{file}:half")
    before = recipe_of(llava)
    file.write_text(f"{METHOD}        # another way\n")
    assert recipe_of(llava) != before


@pytest.mark.parametrize("part", [0, 0.5])
def test_a_torn_file_is_encoded_anew(part, llava, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(visual_cache, "ROWS_PER_FILE", 1)  # a file a batch
    files = pictures(tiny)
    cache, _ = fill(llava, tmp_path, files, batch_size=2)
    torn, *others = cache.folder.glob("tokens-*")
    assert len(others) == 2
    torn.write_bytes(torn.read_bytes()[: int(part * torn.stat().st_size)])
    assert len(VisualCache(tmp_path, recipe_of(llava))) == 4
    cache, count = fill(llava, tmp_path, files)
    assert count == 2
    assert_right(cache, llava, files)


def test_a_kill_loses_only_what_was_not_written(llava, tiny, tmp_path, monkeypatch):
    """SIGKILL in the third batch of a process of its own, then again from here."""
    monkeypatch.setattr(visual_cache, "ROWS_PER_FILE", 1)
    files, calls, original = pictures(tiny), [], llava.encode_images

    def killed(pixels: Tensor) -> list[Tensor]:
        calls.append(len(pixels))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(llava, "encode_images", killed)
        process = FORK.Process(target=fill, args=(llava, tmp_path, files), kwargs={"batch_size": 2})
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    cache, count = fill(llava, tmp_path, files)
    assert count == 2
    assert_right(cache, llava, files)


def test_two_processes_fill_one_folder(llava, tiny, tmp_path):
    files = pictures(tiny)
    process = FORK.Process(target=fill, args=(llava, tmp_path, files[:4]), kwargs={"batch_size": 1})
    process.start()
    fill(llava, tmp_path, files[2:], batch_size=1)
    process.join()
    assert process.exitcode == 0
    cache = VisualCache(tmp_path, recipe_of(llava))
    for file in files:
        torch.testing.assert_close(cache[digest_of(file)].float(), encoded(llava, file), atol=2e-3, rtol=2e-3)


# In a run


def test_a_run_on_the_cache_learns_the_same(tiny, tmp_path):
    flags = f"{STAGES['lora']} --max_steps 5 --save_strategy no --lora_dropout 0 --reducer prumerge+"
    plain = tiny.train(tmp_path / "plain", flags)
    cached = tiny.train(tmp_path / "cached", f"{flags} --visual_cache {tmp_path / 'cache'}")
    assert [row["loss"] for row in cached] == pytest.approx([row["loss"] for row in plain], abs=2e-3)
    key = "visual_tokens_per_image"
    assert [row.get(key) for row in cached] == [row.get(key) for row in plain]


def test_the_tower_never_runs_once_the_cache_is_full(tiny, tmp_path, monkeypatch):
    flags = f"{STAGES['projector']} --max_steps 2 --save_strategy no --visual_cache {tmp_path / 'cache'}"
    first = tiny.train(tmp_path / "a", flags)
    original = LlavaLlamaForCausalLM.encode_images
    batches: list[int] = []

    def counted(self, pixels: Tensor) -> list[Tensor]:
        batches.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "encode_images", counted)
    second = tiny.train(tmp_path / "b", flags)
    assert not batches
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_bad_picture_stops_the_run_or_is_passed_over(mode, tiny, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(tiny.images, images)
    (images / "3.png").write_bytes(b"no picture")
    (images / "4.png").unlink()
    broken = Tiny(tiny.models, tiny.data, images)
    flags = (
        f"{STAGES['projector']} --num_train_epochs 1 --save_strategy no --visual_cache {tmp_path / 'cache'}"
    )
    argv = broken.argv(tmp_path / "run", f"{flags} --on_bad_sample {mode}")
    if mode == "error":
        with pytest.raises(UserError, match=r"[34]\.png"):
            train(argv=argv)
        return
    train(argv=argv)
    assert len(losses(tmp_path / "run")) == 5
