"""Two processes on the CPU take the steps one process takes with the same global batch: DDP, ZeRO, FSDP."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_training import STAGES, Tiny, losses, make

from llava.model.checkpoints import read_tensors

pytestmark = pytest.mark.slow

# Ten samples are five global batches of two: no process has to repeat a sample to fill its last batch.
STEPS = (
    "--per_device_train_batch_size 1 --train_sampling_strategy sequential --max_steps 4 --lora_dropout 0 "
    "--save_strategy no"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("tiny"))


# accelerate shards over GPUs only, though torch's FSDP2 runs on CPUs as well: here it takes them for GPUs.
FSDP_ON_CPU = """
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from llava.train.train import main

plain = AcceleratorState.__init__

def as_on_gpus(self, *args, fsdp_plugin=None, **options):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = as_on_gpus
main()
"""


def fsdp_environment(root: Path) -> dict[str, str]:
    """What `accelerate launch --config_file scripts/fsdp.yaml` sets."""
    config = yaml.safe_load((root / "scripts/fsdp.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    values = {
        key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in config.items()
    }
    return {"ACCELERATE_USE_FSDP": "true", **{names.get(key, key.upper()): v for key, v in values.items()}}


def launch(root: Path, tiny: Tiny, out: Path, flags: str, *, fsdp: bool = False) -> list[dict]:
    """The same run in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLAVA_CACHE": str(out.parent / "cache")}
    program = ["-m", "llava.train.train"]
    if fsdp:
        program = [str(out.parent / "fsdp_on_cpu.py")]
        Path(program[0]).write_text(FSDP_ON_CPU)
        environment |= {**fsdp_environment(root), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, *program, *tiny.argv(out, flags)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return losses(out)


def single(tiny: Tiny, out: Path, flags: str) -> list[dict]:
    """One process, two micro batches for the other's two processes."""
    return tiny.train(out, f"{flags} --gradient_accumulation_steps 2")


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert len(ours) == len(theirs) == 4
    for key in ("loss", "learning_rate"):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], abs=tolerance), key
    assert [r["grad_norm"] for r in ours] == pytest.approx(
        [r["grad_norm"] for r in theirs], rel=max(tolerance, 1e-3)
    )
    key = "visual_tokens_per_image"
    assert [r.get(key) for r in ours] == [r.get(key) for r in theirs]


CASES = {
    "ddp-lora": ("lora", ""),
    "ddp-full": ("full", ""),
    "zero2-full": ("full", "--deepspeed scripts/zero2.json"),
    "zero2-projector": ("projector", "--deepspeed scripts/zero2.json"),
    "zero2-lora": ("lora", "--deepspeed scripts/zero2.json --gradient_checkpointing True"),
    "zero3-full": ("full", "--deepspeed scripts/zero3.json"),
    "zero3-lora": ("lora", "--deepspeed scripts/zero3.json --gradient_checkpointing True"),
    "zero3-projector": ("projector", "--deepspeed scripts/zero3.json"),
    "fsdp-full": ("full", ""),
    "fsdp-lora": ("lora", "--gradient_checkpointing True"),
}
FILES = {"full": "model.safetensors", "lora": "non_lora_trainables.bin", "projector": "mm_projector.bin"}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(case: str, root: Path, tiny: Tiny, tmp_path: Path) -> None:
    """LoRA runs do so with visual tokens from a cache that both fill, and go on from a checkpoint."""
    stage, flags = CASES[case]
    if "zero" in case:
        pytest.importorskip("deepspeed")
    fsdp, resumes = "fsdp" in case, stage == "lora"
    flags = f"{STAGES[stage].replace('--group_by_modality_length True', '')} {STEPS} {flags}"
    if resumes:
        flags += " --save_strategy steps --save_steps 2"
    theirs = single(tiny, tmp_path / "one", re.sub(r"--deepspeed \S+", "", flags))
    if resumes:
        flags += f" --visual_cache {tmp_path / 'tokens'}"
    ours = launch(root, tiny, tmp_path / "two", flags, fsdp=fsdp)
    assert_same(ours, theirs, 1e-3 if resumes else 2e-4)  # cached tokens are float16
    assert_same_weights(tmp_path / "two" / FILES[stage], tmp_path / "one" / FILES[stage], 1e-3)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    if resumes:
        part = tmp_path / "part"
        part.mkdir()
        (tmp_path / "two" / "checkpoint-2").rename(part / "checkpoint-2")
        assert any("fsdp" in path.name for path in (part / "checkpoint-2").iterdir()) == fsdp
        again = launch(root, tiny, part, flags, fsdp=fsdp)
        assert [row["step"] for row in again] == [3, 4]
        assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in ours[2:]], abs=1e-6)
        assert_same_weights(part / FILES[stage], tmp_path / "two" / FILES[stage], 1e-5)


def assert_same_weights(ours: Path, theirs: Path, tolerance: float) -> None:
    one, two = read_tensors(ours), read_tensors(theirs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=tolerance, rtol=tolerance)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("stage", ["lora", "full"])
def test_zero3_in_bfloat16(stage: str, root: Path, tiny: Tiny, tmp_path: Path) -> None:
    """The weights themselves are rounded to bfloat16; one process trains float32 weights under autocast, so
    losses after the first differ a little (by 0.1 of 5 on one CPU) while they fall by 2."""
    pytest.importorskip("deepspeed")
    flags = f"{STAGES[stage].replace('--group_by_modality_length True', '')} {STEPS} --bf16 True"
    one = single(tiny, tmp_path / "one", flags)
    two = launch(root, tiny, tmp_path / "two", f"{flags} --deepspeed scripts/zero3.json")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=0.01)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=0.2)
