"""Formats on disk: recognised by content, read strictly, complained about in one sentence, written whole."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, single_safetensors, write_json

from llava.errors import UserError
from llava.model import checkpoints
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.model.checkpoints import (
    canonical_name,
    check_weights,
    inspect_checkpoint,
    llava_hf_name,
    locate,
    read_model_weights,
    read_tensors,
    read_weights,
    replacing,
    write_tensors,
)

# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.mm_projector.2.bias", "model.mm_projector.2.bias"),
        ("mm_projector.weight", "model.mm_projector.weight"),
        ("model.image_newline", "model.image_newline"),
        ("image_newline", "model.image_newline"),
        # transformers' old tables
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.vision_tower.vision_tower.vision_model.embeddings.position_ids", None),
        # PEFT and non_lora_trainables of any age
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        # llava-hf: on disk, then in transformers 5's memory
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight"),
        ("model.multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        (
            "model.vision_tower.encoder.layers.3.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.3.mlp.fc1.bias",
        ),
        # self-trained checkpoints
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.3.mlp.fc1.bias",
        ),
        (
            "model.vision_tower.vision_tower.encoder.layer.3.norm1.bias",
            "model.vision_tower.encoder.layer.3.norm1.bias",
        ),
    ],
)
def test_canonical_name(name, expected):
    assert canonical_name(name) == expected
    if expected is not None:
        assert canonical_name(expected) == expected


def test_llava_hf_names_are_those_on_disk(golden):
    names = load_file(golden / "llava/ckpt/llava-tiny-1.5-7b-hf/model.safetensors").keys()
    assert {llava_hf_name(canonical_name(name)) for name in names} == set(names)


# Recognising


def test_kinds_do_not_depend_on_names(tiny):
    """Names that say the opposite of what is inside."""
    for directory, name in (
        (tiny.full, "my-lora"),
        (tiny.lora, "whole-model"),
        (tiny.base, "llava-v1.5-7b-pretrain"),
    ):
        kind = inspect_checkpoint(directory).kind
        assert inspect_checkpoint(directory.rename(tiny.root / name)).kind == kind


def test_golden_kinds(golden):
    kinds = {path.name: inspect_checkpoint(path).kind for path in (golden / "llava/ckpt").iterdir()}
    assert kinds == {
        "clip-tiny-336": "vision_tower",
        "llava-tiny-1.5-7b-hf": "llava_hf",
        "llava-tiny-v1.5-7b": "full",
        "llava-tiny-v1.5-7b-lora": "lora",
        "llava-tiny-v1.5-7b-pretrain": "projector",
        "llava-tiny-v1.5-7b-withtower": "full",
        "vicuna-tiny-7b-v1.5": "plain_lm",
    }


def test_weights_beside_an_adapter_are_the_model(tiny):
    for file in tiny.lora.glob("adapter_*"):
        shutil.copy(file, tiny.full)
    assert inspect_checkpoint(tiny.full).kind == "full"


def test_missing_base_is_named(tiny):
    for directory in (tiny.lora, tiny.projector):
        with pytest.raises(UserError, match=r"someone/base-tiny.*--model-base someone/base-tiny") as error:
            read_model_weights(inspect_checkpoint(directory))
        assert str(directory) in str(error.value)


# Bases


def test_a_base_on_this_machine_is_found_and_announced(tiny, caplog):
    edit_json(tiny.lora / "adapter_config.json", base_model_name_or_path="base-tiny")
    with caplog.at_level(logging.WARNING):
        info = inspect_checkpoint(tiny.lora)
    assert info.base.path.resolve() == tiny.base.resolve()
    assert str(info.base.path) in caplog.text


def test_a_given_base_wins(tiny):
    other = shutil.copytree(tiny.base, tiny.root / "other")
    edit_json(tiny.lora / "adapter_config.json", base_model_name_or_path=str(tiny.base))
    assert inspect_checkpoint(tiny.lora, other).base.path == other


@pytest.mark.parametrize("base", ["lora", "projector", "tower"])
def test_wrong_kind_of_base(tiny, base):
    with pytest.raises(UserError, match="--model-base"):
        inspect_checkpoint(tiny.lora, getattr(tiny, base))


# Finding


@pytest.mark.parametrize("name", ["no-such-directory", "/no/such/directory", "a/b/c", "./x"])
def test_no_such_directory(name):
    with pytest.raises(UserError, match=f"{name}.*--model-path"):
        inspect_checkpoint(name)


def test_hub_out_of_reach(tmp_path):
    """One sentence and status 2, though HF_HUB_OFFLINE does not say that there is no network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "llava.cli", "doctor", "checkpoint", "nobody/nothing"]
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "hf download nobody/nothing" in done.stderr.strip().splitlines()[-1]


def test_tokenizer_and_tower_of_a_hub_out_of_reach(tiny):
    with pytest.raises(UserError, match="nobody/nothing"):
        load_tokenizer("nobody/nothing")
    edit_json(tiny.full / "config.json", mm_vision_tower="nobody/nothing")
    with pytest.raises(UserError, match=r"nobody/nothing.*--vision-tower"):
        load_pretrained_model(tiny.full, device="cpu")


def test_a_local_directory_wins_over_the_hub(tiny, monkeypatch):
    (tiny.root / "liuhaotian").mkdir()
    tiny.full.rename(tiny.root / "liuhaotian/llava-v1.5-7b")
    monkeypatch.chdir(tiny.root)
    monkeypatch.setattr(locate, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert inspect_checkpoint("liuhaotian/llava-v1.5-7b").kind == "full"


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_download_takes_one_format(tiny, monkeypatch, has_safetensors):
    """Of a repository with model.safetensors and pytorch_model.bin, or with the latter only."""
    remote = {"config.json", "mm_projector.bin", "pytorch_model.bin", "training_args.bin", "x/optimizer.bin"}
    remote |= {"model.safetensors"} if has_safetensors else set()
    downloaded = set()

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "liuhaotian/llava-v1.5-7b"
        found = filter_repo_objects(remote, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        downloaded.update(found)
        return str(tiny.base if has_safetensors else tiny.full)

    single_safetensors(tiny.base, tiny.language_model)
    monkeypatch.setattr(locate, "snapshot_download", download)
    inspect_checkpoint("liuhaotian/llava-v1.5-7b")
    model = "model.safetensors" if has_safetensors else "pytorch_model.bin"
    assert downloaded == {"config.json", "mm_projector.bin", model}


# Reading


def test_shards_hold_what_one_file_holds(tiny):
    sharded = read_model_weights(inspect_checkpoint(tiny.full)).tensors
    assert sharded.keys() == {**tiny.language_model, **tiny.projector_weights}.keys()
    single_safetensors(tiny.full, {**tiny.language_model, **tiny.projector_weights})
    single = read_model_weights(inspect_checkpoint(tiny.full)).tensors
    assert all(torch.equal(single[name], sharded[name]) for name in sharded)
    assert single.keys() == sharded.keys()


def test_only_the_shards_that_are_wanted_are_opened(tiny):
    info = inspect_checkpoint(tiny.full)
    (tiny.full / "pytorch_model-00001-of-00002.bin").write_bytes(b"unreadable")
    wanted = read_weights(info.weights, keep=lambda name: name.startswith("model.norm"))
    assert list(wanted.tensors) == ["model.norm.weight"]


def test_safetensors_extras(tiny):
    file = tiny.lora / "non_lora_trainables.bin"
    save_file(torch.load(file), file.with_suffix(".safetensors"))
    file.unlink()
    assert inspect_checkpoint(tiny.lora).extra.suffix == ".safetensors"
    adapter = tiny.lora / "adapter_model.bin"
    save_file(torch.load(adapter), adapter.with_suffix(".safetensors"))
    adapter.unlink()
    assert len(checkpoints.read_adapter(inspect_checkpoint(tiny.lora))) == 8


def test_old_torch_format(tiny):
    file = tiny.root / "old.bin"
    torch.save(tiny.projector_weights, file, _use_new_zipfile_serialization=False)
    found = read_tensors(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tiny.projector_weights.items())


def test_reading_maps_and_does_not_copy(tmp_path):
    """Of 256 MB nothing becomes resident before it is used."""
    torch.save({"a": torch.zeros(2**26)}, tmp_path / "a.bin")
    save_file({"a": torch.zeros(2**26)}, tmp_path / "a.safetensors")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for name in ("a.bin", "a.safetensors"):
        before = resident()
        tensors = read_tensors(tmp_path / name)
        assert tensors["a"].nbytes == 2**28
        assert resident() - before < 2**26


# Bad input: one sentence that names the file and the remedy


def truncate(file: Path, keep: float = 0.7) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


CONFIG, INDEX = "config.json", "pytorch_model.bin.index.json"
FIRST, SECOND = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
BAD_FILES = {
    "not UTF-8": (CONFIG, lambda file: file.write_bytes(b'{"model_type": "ll\xe4va"}')),
    "not JSON": (CONFIG, lambda file: file.write_text('{"model_type": "llava",')),
    "a list": (CONFIG, lambda file: file.write_text("[]")),
    "no config": (CONFIG, Path.unlink),
    "truncated": (SECOND, truncate),
    "empty": (FIRST, lambda file: file.write_bytes(b"")),
    "an error page": (FIRST, lambda file: file.write_text("<html>Quota exceeded</html>")),
    "a Git LFS pointer": (FIRST, lambda file: file.write_text("version https://git-lfs.github.com/spec/v1")),
    "a missing shard": (FIRST, Path.unlink),
    "no index": (INDEX, Path.unlink),
    "an index without its table": (INDEX, lambda file: write_json(file, {"metadata": {}})),
    "code": (SECOND, lambda file: torch.save({"model.norm.weight": Malicious()}, file)),
    "no tensors": (SECOND, lambda file: torch.save({"model.norm.weight": 1}, file)),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_damaged_files(tiny, damage, monkeypatch):
    """One sentence that names the file; nothing in a file is executed."""
    monkeypatch.chdir(tiny.root)
    name, do = BAD_FILES[damage]
    do(tiny.full / name)
    with pytest.raises(UserError) as error:
        read_model_weights(inspect_checkpoint(tiny.full))
    assert str(tiny.full) in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tiny.root / "executed").exists()


BAD_CHECKPOINTS = {
    # which, the file that is removed, what the sentence names
    "adapter without its config": ("lora", "adapter_config.json", "adapter_config.json"),
    "adapter config alone": ("lora", "adapter_model.bin", "adapter_model.safetensors"),
    "intermediate LoRA": ("lora", "non_lora_trainables.bin", "non_lora_trainables.bin"),
    "no weights": ("projector", "mm_projector.bin", "mm_projector.bin"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_incomplete_checkpoints(tiny, kind):
    """One sentence that names the directory and the file."""
    which, removed, named = BAD_CHECKPOINTS[kind]
    directory = getattr(tiny, which)
    (directory / removed).unlink()
    with pytest.raises(UserError, match=named) as error:
        read_model_weights(inspect_checkpoint(directory, tiny.base))
    assert str(directory) in str(error.value)


# Checking


@pytest.mark.parametrize("name", ["lm_head.weight", "model.resampler.weight"])
def test_missing_and_unexpected_weights_are_named(tiny, name):
    info = inspect_checkpoint(tiny.full)
    found = read_model_weights(info)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    if name in shapes:
        found = found.select(lambda other: other != name)
    else:
        found.set(name, torch.zeros(1), info.files[0])
    with pytest.raises(UserError, match=f"llava-tiny.* 1 weights.*{name}"):
        check_weights(found, shapes, info)


# Writing


def test_a_new_directory_appears_whole(tmp_path):
    out = tmp_path / "deep/out"
    with replacing(out) as directory:
        (directory / "config.json").write_text("{}")
        (directory / "config.json").chmod(0o600)  # as safetensors leaves its files
        assert not out.exists()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_text("")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (out / "config.json").stat().st_mode == (tmp_path / "plain/file").stat().st_mode
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), replacing(out) as directory:
        (directory / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_replacing_clears_stale_weights_and_keeps_the_rest(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "trainer_state.json",
    ):
        (out / name).write_text("old")
    with replacing(out) as directory:
        (directory / "model.safetensors").write_text("new")
        (directory / "config.json").write_text("new")
    assert {file.name for file in out.iterdir()} == {
        "checkpoint-1",
        "config.json",
        "model.safetensors",
        "trainer_state.json",
    }
    assert (out / "config.json").read_text() == "new"


def test_an_interrupted_move_is_not_mistaken_for_a_checkpoint(tiny, monkeypatch):
    real = os.replace

    def fails_at_weights(source, target):
        if Path(target).name == "mm_projector.bin":
            raise OSError("killed")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails_at_weights)
    with pytest.raises(OSError, match="killed"), replacing(tiny.projector) as directory:
        (directory / "config.json").write_text("{}")
        (directory / "mm_projector.bin").write_text("")
    with pytest.raises(UserError, match=r"config\.json"):
        inspect_checkpoint(tiny.projector)


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_write_tensors_writes_no_more_than_it_is_given(tmp_path, name):
    whole = torch.randn(1000, 64)
    write_tensors({"a": whole[:2], "b": torch.nn.Parameter(whole[2:3].T)}, tmp_path / "sub" / name)
    file = tmp_path / "sub" / name
    assert file.stat().st_size < 10_000
    found = read_tensors(file)
    assert torch.equal(found["a"], whole[:2])
    assert torch.equal(found["b"], whole[2:3].T)
    assert [path.name for path in file.parent.iterdir()] == [name]
