"""Training against LLaVA's own: real runs of the reference on tiny models, step by step and file by file."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import silent, trainer

from llava.model.checkpoints import read_tensors
from llava.train.arguments import parse
from llava.train.setup import build
from llava.train.train import train
from llava.train.trainer import parameter_groups

VISION = (
    "--vision_tower ckpt/clip-tiny-336 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 "
    "--mm_use_im_patch_token False"
)
RUN = "--use_cpu True --model_max_length 2048 --weight_decay 0.1 --logging_steps 1 --disable_tqdm True"


@pytest.fixture
def reference(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reference data; its files name one another relative to this folder."""
    folder = golden / "llava"
    monkeypatch.chdir(folder)
    return folder


STEPS = {
    "projector": "--version plain --tune_mm_mlp_adapter True --image_aspect_ratio square",
    "full": "--version v1 --image_aspect_ratio pad",
    "full_projlr": "--version v1 --image_aspect_ratio pad --mm_projector_lr 2e-4",
}


@pytest.mark.parametrize("stage", STEPS)
def test_four_steps_are_the_references(stage, reference, tmp_path, monkeypatch):
    expected = json.loads((reference / "train/steps.json").read_text())[stage]
    final = np.load(reference / "train/steps.npz")
    argv = shlex.split(
        f"--model_name_or_path ckpt/llava-tiny-v1.5-7b {VISION} {RUN} {STEPS[stage]} --image_folder images "
        f"--data_path {expected['data']} --output_dir {tmp_path} --learning_rate {expected['lr']} "
        "--max_steps 4 --lr_scheduler_type constant --per_device_train_batch_size 2 --max_grad_norm 0 "
        "--train_sampling_strategy sequential --save_strategy no"
    )
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    prepared, run = trainer(argv, [row for batch in expected["batches"] for row in batch])
    run.train()

    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(expected["losses"], abs=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected["grad_norms"], abs=1e-3)
    weights = prepared.llava.state_dict()
    names = {"q0": "model.layers.0.self_attn.q_proj.weight", "norm": "model.norm.weight"}
    compared = 0
    for key in final.files:
        if key.startswith(f"{stage}__"):
            name = key.removeprefix(f"{stage}__")
            ours = weights[names.get(name, f"model.{name}")].numpy()
            assert np.abs(ours - final[key]).max() < 1e-4, name
            compared += 1
    assert compared == (4 if stage == "projector" else 6)

    with torch.no_grad():
        batch = run.data_collator([run.train_dataset[row] for row in range(len(expected["batches"][0]))])
        loss = prepared.llava.eval()(**batch).loss
    assert loss.item() == pytest.approx(expected["loss_batch0_after"], abs=1e-4)


STAGES = ("pretrain", "finetune", "finetune_projlr", "lora", "task_lora", "freeze_backbone", "freeze_adapter")
OURS = {"run.json", "log.jsonl", "chat_template.jinja", "tokenizer.json"}
"""Files we leave beside LLaVA's."""
GONE = {"special_tokens_map.json"}
"""Files transformers 5 no longer writes: what was in it is in tokenizer_config.json."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_what_the_reference_leaves(stage, reference, tmp_path):
    expected = json.loads((reference / "train/artefacts.json").read_text())[stage]
    argv = shlex.split(
        f"{VISION} {RUN} {expected['args']} --image_folder images --output_dir {tmp_path} --max_steps 2 "
        "--per_device_train_batch_size 2 --save_steps 1 --save_total_limit 1"
    )
    train(argv=argv)

    files = {
        str(Path(folder, name).relative_to(tmp_path))
        for folder, _, names in os.walk(tmp_path)
        for name in names
    }
    wanted = {name for name in expected["files"] if Path(name).name not in GONE}
    if stage == "pretrain":  # the reference keeps every projector; we apply save_total_limit
        wanted = {name for name in wanted if not name.startswith("checkpoint-1/")}
    assert wanted <= files
    top = {name for name in files - wanted if "/" not in name}
    assert {name for name in top if Path(name).name not in OURS} == set()

    for name, shapes in expected["files"].items():
        if not shapes or name not in wanted:
            continue
        ours = {key: list(tensor.shape) for key, tensor in read_tensors(tmp_path / name).items()}
        # Of the tower's blocks the reference lists the first.
        assert {key: ours[key] for key in shapes} == shapes, name
        assert all("vision_tower" in key for key in ours.keys() - shapes.keys()), name

    config = json.loads((tmp_path / "config.json").read_text())
    same = {key for key in expected["config"] if key.startswith(("mm_", "tune_", "freeze_", "tokenizer_"))}
    same |= {"architectures", "image_aspect_ratio", "model_type", "use_cache", "vocab_size", "hidden_size"}
    same |= {"_name_or_path", "torch_dtype", "rope_theta", "use_mm_proj"}
    if stage in ("pretrain", "lora", "task_lora"):
        same -= {"torch_dtype"}  # the reference records the base's, we the one that was computed in
    assert {key: config.get(key) for key in same} == {key: expected["config"][key] for key in same}
    assert config["mm_token_reducer"] == "none"

    if "adapter_config" in expected:
        adapter = json.loads((tmp_path / "adapter_config.json").read_text())
        for key in ("r", "lora_alpha", "lora_dropout", "bias", "task_type", "base_model_name_or_path"):
            assert adapter[key] == expected["adapter_config"][key], key
        assert set(adapter["target_modules"]) == set(expected["adapter_config"]["target_modules"])


@pytest.mark.parametrize("stage", STAGES)
def test_what_trains_and_in_which_group(stage, reference, tmp_path):
    expected = json.loads((reference / "train/artefacts.json").read_text())[stage]
    argv = shlex.split(f"{VISION} {RUN} {expected['args']} --image_folder images --output_dir {tmp_path}")
    model_args, data_args, training_args = parse(argv, silent)
    model = build(model_args, data_args, training_args, silent).model

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trainable) == sorted(expected["trainable"])
    assert not any("vision_tower" in name for name in trainable)
    groups = parameter_groups(model, training_args)
    assert len(groups) == len(expected["groups"])
    for ours, theirs in zip(groups, expected["groups"], strict=True):
        assert sorted(names[id(parameter)] for parameter in ours["params"]) == sorted(theirs["params"])
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert ours.get("lr", training_args.learning_rate) == theirs["lr"]
