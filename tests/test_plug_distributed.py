"""transformers' Trainer on a reduced model in two processes takes the steps that it takes in one."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from forked import in_two_processes, shard_on_cpus
from plug_models import Row, build, labelled, lengths_seen

from llava.plug import reduce_tokens, restore

pytestmark = pytest.mark.slow

SPEC = "prumerge+(tokens=12)"
ROWS = [Row(seed, 5, 3 + 2 * seed, size=[(200, 200), (100, 200)][seed % 2]) for seed in range(4)]
LAYERS = {"Llava": "LlamaDecoderLayer", "LlavaNext": "MistralDecoderLayer"}


def train_two_steps(kind: str, how: str, source: Path, out: Path) -> None:
    """Batches of two rows, saved in `out`; with the losses and what the language model saw, by rank."""
    shard_on_cpus(fsdp=how == "fsdp", deepspeed=how == "zero3")
    options: dict[str, Any] = {"per_device_train_batch_size": 2 if how == "one" else 1}
    if how == "fsdp":
        layers = {"version": 2, "transformer_layer_cls_to_wrap": [LAYERS[kind]]}
        options |= {"fsdp": True, "fsdp_config": layers}
    elif how == "zero3":
        sharding = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        others = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
        options["deepspeed"] = {"zero_optimization": sharding, **others}
    arguments = tf.TrainingArguments(
        out,
        **{"max_steps": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no"},
        **{"remove_unused_columns": False, "train_sampling_strategy": "sequential", "disable_tqdm": True},
        # A large epsilon: steps follow the gradients, and not only their signs, which are noise near 0.
        **{"learning_rate": 1e-2, "optim": "adamw_torch", "adam_epsilon": 1e-2},
        **options,
    )
    if how == "zero3":
        importlib.import_module("deepspeed").init_distributed(dist_backend="gloo")
    model = getattr(tf, f"{kind}ForConditionalGeneration").from_pretrained(source)  # in pieces under ZeRO-3
    reduce_tokens(model, SPEC)
    lengths = lengths_seen(model)
    trainer = tf.Trainer(
        model, arguments, train_dataset=ROWS, data_collator=lambda rows: labelled(kind, list(rows))
    )
    trainer.train()
    trainer.save_model(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (out / f"{arguments.process_index}.json").write_text(json.dumps({"loss": losses, "lengths": lengths}))
    if how == "fsdp":
        with pytest.raises(ValueError, match="sharded"):
            restore(model)
    else:
        assert type(restore(model)).__mro__[1].__module__.startswith("transformers.")


@pytest.mark.parametrize(("kind", "how"), [("Llava", "ddp"), ("LlavaNext", "fsdp"), ("LlavaNext", "zero3")])
def test_two_processes_take_the_steps_of_one(kind, how, tmp_path):
    if how == "zero3":
        pytest.importorskip("deepspeed")
    source, one, two = (tmp_path / name for name in ("source", "one", "two"))
    for folder in (one, two):
        folder.mkdir()
    build(kind).save_pretrained(source)
    train_two_steps(kind, "one", source, one)
    in_two_processes(train_two_steps, kind, how, source, two)
    single, *ours = (json.loads(f.read_text()) for f in (one / "0.json", two / "0.json", two / "1.json"))
    tiles = {"Llava": (1, 1), "LlavaNext": (5, 3)}[kind]  # each gives 12 tokens and the merged one
    for rank, run in enumerate(ours):
        assert run["loss"] == pytest.approx(single["loss"], abs=1e-4)
        assert run["lengths"] == [13 * tiles[rank] + 5 + ROWS[rank + step].after for step in (0, 2)]
    model_class = getattr(tf, f"{kind}ForConditionalGeneration")  # ZeRO-3 names weights otherwise in its file
    models = [model_class.from_pretrained(folder) for folder in (source, one, two)]
    moved = 0
    for before, expected, found in zip(*(model.parameters() for model in models), strict=True):
        moved += bool((expected - before).abs().max() > 1e-3)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert moved > 40
    assert reduce_tokens(models[2]).reducer.spec == SPEC
