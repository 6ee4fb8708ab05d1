"""Several processes on the CPU: DDP, ZeRO and FSDP take the steps of one; what a killed run leaves."""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from forked import PROCESSES, in_two_processes, shard_on_cpus
from test_train import assert_same_run
from tiny_training import STAGES, Tiny, losses, make

from llava.model.checkpoints import read_tensors
from llava.train.train import train

pytestmark = pytest.mark.slow

# Ten samples are five global batches of two: no process has to repeat a sample to fill its last batch.
STEPS = (
    "--per_device_train_batch_size 1 --train_sampling_strategy sequential --max_steps 4 --lora_dropout 0 "
    "--save_strategy no"
)
RESUMABLE = "--save_strategy steps --save_steps 2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def single(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a stage's run in one process: two micro batches for the other's two processes."""

    @cache
    def run(stage: str, flags: str = "") -> Path:
        out = tmp_path_factory.mktemp("one")
        tiny.train(out, f"{flags_of(stage)} {flags} --gradient_accumulation_steps 2")
        return out

    return run


def flags_of(stage: str) -> str:
    resumable = RESUMABLE if stage == "lora" else ""
    return f"{STAGES[stage].replace('--group_by_modality_length True', '')} {STEPS} {resumable}"


def train_on_cpus(argv: list[str]) -> None:
    shard_on_cpus(fsdp="ACCELERATE_USE_FSDP" in os.environ, deepspeed="--deepspeed" in argv)
    train(argv=argv)


def fsdp_environment(root: Path) -> dict[str, str]:
    """What `accelerate launch --config_file scripts/fsdp.yaml` sets."""
    config = yaml.safe_load((root / "scripts/fsdp.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    values = {
        key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in config.items()
    }
    return {"ACCELERATE_USE_FSDP": "true", **{names.get(key, key.upper()): v for key, v in values.items()}}


def launch(root: Path, tiny: Tiny, out: Path, flags: str, *, how: str = "ddp") -> list[dict]:
    """The same run in two processes."""
    argv = tiny.argv(out, flags)
    if how == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "llava.train.train", *argv]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        in_two_processes(train_on_cpus, argv, **(fsdp_environment(root) if how == "fsdp" else {}))
    return losses(out)


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert len(ours) == len(theirs) == 4
    for key in ("loss", "learning_rate"):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], abs=tolerance), key
    assert [r["grad_norm"] for r in ours] == pytest.approx(
        [r["grad_norm"] for r in theirs], rel=max(tolerance, 1e-3)
    )
    key = "visual_tokens_per_image"
    assert [r.get(key) for r in ours] == [r.get(key) for r in theirs]


CASES = [
    *(("ddp", "lora"), ("torchrun", "full")),
    *(("zero2", "full"), ("zero2", "projector"), ("zero2", "lora")),
    *(("zero3", "full"), ("zero3", "projector"), ("zero3", "lora")),
    *(("fsdp", "full"), ("fsdp", "lora")),
]
FILES = {"full": "model.safetensors", "lora": "non_lora_trainables.bin", "projector": "mm_projector.bin"}


@pytest.mark.parametrize(("how", "stage"), CASES)
def test_two_processes_take_the_steps_of_one(how, stage, root, tiny, single, tmp_path):
    """LoRA runs do so with visual tokens from a cache that both fill, and go on from a checkpoint."""
    resumes, flags, one, two = stage == "lora", flags_of(stage), single(stage), tmp_path / "two"
    if how.startswith("zero"):
        pytest.importorskip("deepspeed")
        flags += f" --deepspeed {root}/scripts/{how}.json"
    if resumes:
        flags += f" --visual_cache {tmp_path / 'tokens'}"
        flags += "" if how == "ddp" else " --gradient_checkpointing True"
    ours = launch(root, tiny, two, flags, how=how)
    assert_same(ours, losses(one), 1e-3 if resumes else 2e-4)  # cached tokens are float16
    assert_same_weights(two / FILES[stage], one / FILES[stage], 1e-3)
    assert files(two) == files(one)
    if resumes:
        part = tmp_path / "part"
        part.mkdir()
        (two / "checkpoint-2").rename(part / "checkpoint-2")
        assert any("fsdp" in path.name for path in (part / "checkpoint-2").iterdir()) == (how == "fsdp")
        again = launch(root, tiny, part, flags, how=how)
        assert [row["step"] for row in again] == [3, 4]
        assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in ours[2:]], abs=1e-6)
        assert_same_weights(part / FILES[stage], two / FILES[stage], 1e-5)


def assert_same_weights(ours: Path, theirs: Path, tolerance: float) -> None:
    one, two = read_tensors(ours), read_tensors(theirs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=tolerance, rtol=tolerance)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_lora_trains_further_under_zero3(root, tiny, single, tmp_path):
    pytest.importorskip("deepspeed")
    further = f"--lora_weight_path {single('lora')}"
    flags = f"{flags_of('lora')} {further} --deepspeed {root}/scripts/zero3.json"
    ours = launch(root, tiny, tmp_path, flags, how="zero3")
    assert_same(ours, losses(single("lora", further)), 2e-4)


@pytest.mark.parametrize("stage", ["lora", "full"])
def test_zero3_in_bfloat16(stage, root, tiny, single, tmp_path):
    """The weights themselves are rounded to bfloat16; one process trains float32 weights under autocast, so
    losses after the first differ a little (by 0.1 of 5 on one CPU) while they fall by 2."""
    pytest.importorskip("deepspeed")
    one = losses(single(stage, "--bf16 True"))
    flags = f"{flags_of(stage)} --bf16 True --deepspeed {root}/scripts/zero3.json"
    two = launch(root, tiny, tmp_path / "two", flags)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=0.01)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=0.2)


def test_a_run_ended_by_sigkill_goes_on(tiny, tmp_path):
    """A process of its own, killed as soon as a checkpoint stands. (Here one is quickly started.)"""
    flags = f"{STAGES['lora']} --max_steps 6 --save_steps 2"
    tiny.train(tmp_path / "whole", flags)
    process = PROCESSES.Process(target=train, kwargs={"argv": tiny.argv(tmp_path / "killed", flags)})
    process.start()
    while not (tmp_path / "killed/checkpoint-2").exists():
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    tiny.train(tmp_path / "killed", flags)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
