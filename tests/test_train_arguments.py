"""The training command line: defaults, old names, decisions and refusals; and every script's flags."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava import hardware
from llava.errors import UserError
from llava.train.arguments import parse
from llava.train.decisions import split_global_batch


@pytest.fixture(autouse=True)
def no_deepspeed_left():
    """transformers notes a ZeRO-3 file for the whole process as long as the arguments live, and those of a
    refused command line live on in its traceback: models of later tests would be loaded in pieces."""
    yield
    unset_hf_deepspeed_config()


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """The least a run needs."""
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "images").mkdir()
    paths = f"--data_path {tmp_path}/data.json --image_folder {tmp_path}/images --output_dir {tmp_path}/out"
    return shlex.split(f"{paths} --use_cpu True")


def quiet(line: str) -> None:
    pass


def test_defaults_are_llavas(argv):
    model, data, training = parse(argv, quiet)
    assert (model.model_name_or_path, model.version) == ("facebook/opt-125m", "v0")
    assert not (model.freeze_backbone or model.tune_mm_mlp_adapter or model.mm_use_im_start_end)
    assert model.mm_use_im_patch_token
    assert (data.lazy_preprocess, data.is_multimodal, data.image_aspect_ratio) == (False, False, "square")
    expected = {
        "optim": "adamw_torch",
        "remove_unused_columns": False,
        "freeze_mm_mlp_adapter": False,
        "model_max_length": 512,
        "double_quant": True,
        "quant_type": "nf4",
        "bits": 16,
        "lora_enable": False,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_weight_path": "",
        "lora_bias": "none",
        "mm_projector_lr": None,
        "group_by_modality_length": False,
        "mpt_attn_impl": "triton",
        "cache_dir": None,
        "loss_average": "micro_batch",
    }
    assert {name: getattr(training, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--evaluation_strategy no", "eval_strategy", "no"),
        ("--no_cuda True", "use_cpu", True),
        ("--debug --bf16", "bf16", True),
        ("--debug underflow_overflow", "debug", ["underflow_overflow"]),
        ("--mm-projector-lr=1", "mm_projector_lr", 1.0),
    ],
)
def test_flags_of_transformers_4_are_read(argv, flags, name, value):
    _, _, training = parse([*argv, *shlex.split(flags)], quiet)
    assert getattr(training, name) == value


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--warmup_ratio 0.03", 3),
        ("--warmup_ratio 0.03 --warmup_steps 7", 7),
        ("--warmup_steps 7 --warmup_ratio 0.03", 7),
        ("--warmup_steps 0 --warmup_ratio 0.03", 3),
        ("--warmup_ratio 1.0", 100),
        ("", 0),
    ],
)
def test_warmup_means_what_it_meant(argv, flags, steps):
    """transformers 4: of both, warmup_steps wins if it is above 0."""
    _, _, training = parse([*argv, *shlex.split(flags)], quiet)
    assert training.get_warmup_steps(100) == steps


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--fp16 True --bf16 True", ["--fp16", "--bf16"]),
        ("--bf16 True --precision fp16", ["--bf16", "--precision"]),
        ("--fp16 True", ["--fp16"]),
        ("--tf32 True", ["--tf32"]),
        ("--attn_implementation flash_attention_2", ["--attn_implementation"]),
        ("--bits 4", ["--bits", "--lora_enable"]),
        ("--pretrain_mm_mlp_adapter nowhere/mm_projector.bin", ["--pretrain_mm_mlp_adapter", "pretrain.sh"]),
        ("--image_folder nowhere", ["--image_folder"]),
        ("--deepspeed nowhere.json", ["deepspeed", "nowhere.json"]),
        ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", ["--tune_mm_mlp_adapter"]),
        ("--tune_mm_mlp_adapter True --lora_enable True", ["--lora_enable"]),
        ("--tune_mm_mlp_adapter True --mm_use_im_start_end True", ["--mm_use_im_start_end"]),
        ("--warmup_ratio 1.5", ["--warmup_ratio"]),
        ("--mm_token_reducer prumerg", ["--mm_token_reducer", "prumerge"]),
        ("--per_device_train_batch_size 0", ["--per_device_train_batch_size"]),
        ("--global_batch_size 0", ["--global_batch_size"]),
        ("--mm_projector_rl 1", ["--mm_projector_rl", "--mm_projector_lr"]),
        ("--data_path ''", ["--data_path"]),
        ("--save_steps 2.5", ["save_steps"]),
        ("--image_aspect_ratio anyres", ["--image_aspect_ratio", "pad"]),
        ("--mm_vision_select_feature cls", ["--mm_vision_select_feature", "cls_patch"]),
        ("--mm_projector_type mlp2x", ["mm_projector_type", "mlp2x_gelu"]),
        ("--lora_enable True --lora_r 0", ["--lora_r"]),
        ("--dataloader_num_workers -1", ["--dataloader_num_workers"]),
        ("--optim adamw_8bits", ["adamw_8bits"]),
        ("--eval_strategy steps", ["--eval_strategy", "llava eval"]),
        ("--resume_from_checkpoint nowhere", ["--resume_from_checkpoint"]),
        ("--deepspeed scripts/zero2.json --fsdp full_shard", ["--deepspeed", "--fsdp"]),
        ("--bits 4 --lora_enable True --deepspeed scripts/zero3.json", ["--bits 4", "ZeRO-3", "zero2.json"]),
    ],
)
def test_a_bad_combination_names_its_flags(argv, flags, names, root, monkeypatch):
    monkeypatch.chdir(root)
    if "zero3" in flags:
        pytest.importorskip("deepspeed")
    with pytest.raises(UserError) as error:
        parse([*argv, *shlex.split(flags)], quiet)
    for name in names:
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_eight_bits_are_refused_where_the_gpu_has_no_int8(argv, monkeypatch):
    flags = [*argv, "--bits", "8", "--lora_enable", "True"]
    parse(flags, quiet)
    monkeypatch.setattr(hardware, "supports_llm_int8", lambda device=None: False)
    with pytest.raises(UserError, match="--bits 8"):
        parse(flags, quiet)


def test_a_bad_flag_is_a_sentence_and_status_2(argv, root):
    """As a process of its own, which imports neither the trainer nor the model for it."""
    program = (
        "import sys; from llava.cli import main; status = main(['train', *sys.argv[1:]]); "
        "sys.exit(3 if 'transformers.trainer' in sys.modules else status)"
    )
    command = [sys.executable, "-c", program, *argv, "--seed", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--seed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("version", "said"), [("v1", False), ("plain", False), ("v0", True), ("vicuna", True)]
)
def test_a_version_that_means_another_template_is_said(argv, version, said):
    lines: list[str] = []
    parse([*argv, "--version", version], lines.append)
    assert any("written as vicuna_v1" in line for line in lines) == said


def test_precision_auto_asks_the_hardware_and_a_flag_wins(argv, monkeypatch):
    said: list[str] = []
    _, _, training = parse([*argv, "--precision", "auto"], said.append)
    assert (training.bf16, training.fp16, training.attn_implementation) == (False, False, "sdpa")
    assert any("float32" in line for line in said)
    _, _, training = parse([*argv, "--precision", "auto", "--bf16", "True"], quiet)
    assert training.bf16
    monkeypatch.setenv("LLAVA_DTYPE", "bfloat16")
    _, _, training = parse([*argv, "--precision", "auto"], quiet)
    assert training.bf16


def test_the_global_batch_is_kept():
    for total, per_device, world in itertools.product([1, 7, 128, 160, 256], [1, 3, 16, 20], [1, 2, 3, 4, 8]):
        if total < world:
            continue
        batch, steps = split_global_batch(total, per_device, world)
        assert 1 <= batch <= per_device and steps >= 1
        if total % world == 0:
            assert batch * steps * world == total
            assert not [b for b in range(batch + 1, per_device + 1) if (total // world) % b == 0]
        else:
            assert batch == per_device
            error = abs(batch * steps * world - total)
            assert all(abs(batch * s * world - total) >= error for s in (max(1, steps - 1), steps + 1))


def test_an_explicit_accumulation_wins_over_the_global_batch(argv):
    flags = "--global_batch_size 160 --per_device_train_batch_size 20 --gradient_accumulation_steps 2"
    _, _, training = parse([*argv, *flags.split()], quiet)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (20, 2)


def test_trackers_that_are_not_installed_are_left_out(argv):
    said: list[str] = []
    _, _, training = parse([*argv, "--report_to", "clearml"], said.append)
    assert training.report_to == []
    assert any("clearml" in line for line in said)


SCRIPTS = ("pretrain", "finetune", "finetune_lora", "finetune_qlora", "finetune_task", "finetune_task_lora")
RECIPES = {
    # learning rate, global batch, LoRA (r, alpha), projector's learning rate
    "pretrain": (1e-3, 256, None, None),
    "finetune": (2e-5, 128, None, None),
    "finetune_lora": (2e-4, 160, (128, 256), 2e-5),
    "finetune_qlora": (2e-5, 128, (64, 16), None),
    "finetune_task": (2e-5, 128, None, None),
    "finetune_task_lora": (2e-4, 128, (128, 256), 2e-5),
}


def dry_run(root: Path, script: str, *flags: str, **settings: str) -> list[str]:
    """The command a script would run."""
    environment = {**os.environ, "DRY_RUN": "1", **settings}
    script = str(root / "scripts/v1_5" / f"{script}.sh")
    done = subprocess.run(
        ["bash", script, *flags], env=environment, capture_output=True, text=True, check=True
    )
    return shlex.split(done.stdout)


def files_to_train_on(folder: Path) -> dict[str, str]:
    """A script's settings, of files that are there."""
    (folder / "data.json").write_text("[]")
    (folder / "mm_projector.bin").write_text("")
    return {
        "DATA": str(folder / "data.json"),
        "IMAGES": str(folder),
        "PROJECTOR": str(folder / "mm_projector.bin"),
        "OUT": str(folder / "out"),
    }


@pytest.mark.parametrize("mini", ["", "1"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_scripts_flags_are_flags(script, mini, root, tmp_path, monkeypatch):
    settings = {**files_to_train_on(tmp_path), "MINI": mini, "GPUS": "0", "REDUCER": "prumerge+"}
    command = dry_run(root, script, "--use_cpu", "True", **settings)
    assert command[:2] == ["python", "llava/train/train_mem.py"]
    # Precision is left to the hardware: nothing asks a V100 for bfloat16, tf32 or flash-attn.
    assert not {"--bf16", "--tf32", "--fp16", "--attn_implementation"} & set(command)
    assert command[command.index("--precision") + 1] == "auto"
    model, data, training = parse(command[2:], quiet)

    rate, batch, lora, projector_rate = RECIPES[script]
    assert training.learning_rate == rate
    total = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert total == (4 if mini else batch)
    assert ((training.lora_r, training.lora_alpha) if training.lora_enable else None) == lora
    assert training.mm_projector_lr == projector_rate
    assert (training.bits == 4) == (script == "finetune_qlora")
    assert model.tune_mm_mlp_adapter == (script == "pretrain")
    assert model.mm_token_reducer == "prumerge+"
    assert data.image_aspect_ratio == ("square" if script == "pretrain" else "pad")
    assert training.warmup_steps == 0.03
    assert (model.mm_vision_select_layer, model.mm_projector_type) == (-2, "mlp2x_gelu")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_one_process_per_gpu_and_a_flag_wins(script, root):
    command = dry_run(
        root, script, "--learning_rate", "7", GPUS="3", NNODES="2", NODE_RANK="1", MASTER_ADDR="a"
    )
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    for flag, value in (
        ("--nproc_per_node", "3"),
        ("--nnodes", "2"),
        ("--node_rank", "1"),
        ("--master_addr", "a"),
    ):
        assert command[command.index(flag) + 1] == value
    assert command[-2:] == ["--learning_rate", "7"]
    config = command[command.index("--deepspeed") + 1]
    assert (root / config).is_file()
    assert "--deepspeed" not in dry_run(root, script, GPUS="3", DEEPSPEED="none")
    for gpus in ("0", "8"):  # the machine that starts the others may have none
        command = dry_run(root, script, GPUS=gpus, HOSTFILE="hosts")
        assert command[:3] == ["deepspeed", "--hostfile", "hosts"]
        assert "--deepspeed" in command


@pytest.mark.parametrize(
    ("visible", "count"), [("0,2,3", 3), ("GPU-5a, GPU-6b", 2), ("1,-1,2", 1), ("-1", 0), ("", 0)]
)
def test_gpus_are_counted_as_cuda_does(visible, count, root):
    command = dry_run(root, "finetune_lora", CUDA_VISIBLE_DEVICES=visible)
    if count:
        assert command[command.index("--nproc_per_node") + 1] == str(count)
    else:
        assert command[:2] == ["python", "llava/train/train_mem.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_setting(script, root):
    path = root / "scripts/v1_5" / f"{script}.sh"
    shown = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, check=True).stdout
    text = path.read_text() + (path.parent / "common.sh").read_text()
    names = [line.split()[1] for line in text.splitlines() if line.startswith("setting ")]
    assert len(names) > 15
    for name in [*names, "MINI"]:
        assert f"  {name} " in shown
    assert "$" not in shown.replace("$0", "")


def test_the_shipped_deepspeed_configs_gather_and_leave_the_schedule(root):
    for name, stage in (("zero2", 2), ("zero3", 3), ("zero3_offload", 3)):
        config = json.loads((root / "scripts" / f"{name}.json").read_text())
        zero = config["zero_optimization"]
        assert zero["stage"] == stage
        assert "scheduler" not in config  # it would replace the cosine of the recipes
        assert "optimizer" not in config  # it would replace the parameter groups
        if stage == 3:
            assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert {"offload_optimizer", "offload_param"} <= zero.keys()
