"""Training a reduced model of transformers: loss, gradients, and the trainers people use."""

import copy

import pytest
import torch
import transformers as tf
from plug_models import IMAGE, KINDS, Row, batch, build, labelled, lengths_seen, processor

from llava.plug import reduce_tokens

ROWS = [Row(1, 5, 4), Row(2, 3, 9, size=(100, 200))]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_is_cross_entropy_over_the_texts_alone(kind):
    """By hand, row by row: the logits in front of each text id; a batch is the mean over all its ids."""
    model, total, number = reduce_tokens(build(kind), "prumerge"), 0.0, 0
    for row in ROWS:
        inputs = labelled(kind, [row])
        output = model(**inputs)
        ids = inputs["input_ids"][0]
        text = ids[ids != IMAGE]
        scores = output.logits[0].log_softmax(-1)
        # Ids before the picture: each from its predecessor; behind it: from the last visual token on.
        places = [*range(row.before - 1), *range(len(scores) - row.after - 1, len(scores) - 1)]
        losses = -scores[places, text[1:]]
        torch.testing.assert_close(output.loss, losses.mean(), atol=1e-5, rtol=0)
        total, number = total + losses.sum(), number + len(losses)
    for side in ("left", "right"):
        loss = model(**labelled(kind, ROWS, side)).loss
        torch.testing.assert_close(loss, total / number, atol=1e-5, rtol=0)
        shared = model(**labelled(kind, ROWS, side), num_items_in_batch=2 * number).loss
        torch.testing.assert_close(shared, total / number / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_tower_projector_and_text(kind):
    """Those of a batch are the sum of those one by one, with checkpointing and without."""
    model = reduce_tokens(build(kind), "prumerge").train()

    def gradients(inputs) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, num_items_in_batch=10).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found, single = gradients(labelled(kind, ROWS)), [gradients(labelled(kind, [row])) for row in ROWS]
    for part in ("tower", "multi_modal_projector", "language_model"):
        moved = [name for name, value in found.items() if part in name and value.abs().max() > 1e-6]
        assert len(moved) >= 4, part
    if hasattr(model.model, "image_newline"):  # what no row ends with still has a gradient: DDP waits for it
        assert not found["model.image_newline"].any()
    for name, value in found.items():
        torch.testing.assert_close(value, sum(g[name] for g in single), atol=1e-4, rtol=1e-3, msg=name)
    model.gradient_checkpointing_enable()
    for name, value in gradients(labelled(kind, ROWS)).items():
        torch.testing.assert_close(value, found[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_gradient_is_the_slope_of_the_loss():
    """In the tower, by a difference quotient; `pool` has no jumps."""
    model, inputs = reduce_tokens(build("Llava"), "pool(tokens=9)"), labelled("Llava", ROWS)
    weight = model.model.vision_tower.encoder.layers[1].mlp.fc1.weight
    model(**inputs).loss.backward()
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        losses = []
        for step in (0.01, -0.01):
            weight += step * direction
            losses.append(model(**inputs).loss)
            weight -= step * direction
    torch.testing.assert_close((losses[0] - losses[1]) / 0.02, weight.grad.norm(), atol=0, rtol=0.02)


def test_a_tower_that_the_user_froze_stays_frozen_and_one_in_training_mode_too():
    model = build("Llava")
    model.model.vision_tower.requires_grad_(False)
    reduce_tokens(model.train(), "prumerge")(**labelled("Llava", ROWS)).loss.backward()
    assert model.model.vision_tower.training
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


class Samples(torch.utils.data.Dataset):
    """Four samples, as a processor and a collator leave them."""

    def __init__(self):
        self.rows = [{n: v[0] for n, v in labelled("Llava", [Row(seed, 5, 6)]).items()} for seed in range(4)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer_for(model, tmp_path, **options):
    arguments = tf.TrainingArguments(
        tmp_path,
        **{"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 2e-3, "report_to": "none"},
        **{"use_cpu": True, "remove_unused_columns": False, "logging_steps": 1, "save_steps": 8, "seed": 1},
        **options,
    )
    return tf.Trainer(model, arguments, train_dataset=Samples(), eval_dataset=Samples())


def test_trainer_trains_the_reduced_model_and_saves_its_reducer(tmp_path):
    model = reduce_tokens(build("Llava"), "prumerge+(tokens=12)")
    before, seen = copy.deepcopy(model.state_dict()), lengths_seen(model)
    trainer = trainer_for(model, tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert trainer.evaluate()["eval_loss"] < losses[0] / 2
    assert max(seen) == 5 + 13 + 6
    for part in ("vision_tower.encoder.layers.0", "multi_modal_projector", "language_model.layers.0"):
        name = next(name for name in before if part in name and name.endswith("weight"))
        assert not torch.equal(model.state_dict()[name], before[name]), name
    again = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-8")
    assert reduce_tokens(again).reducer == model.reducer
    inputs = batch("Llava", ROWS)
    torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5, rtol=0)


def test_label_smoothing_is_refused(tmp_path):
    model = reduce_tokens(build("Llava"), "prumerge")
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(model, tmp_path, label_smoothing_factor=0.1).train()


def test_lora(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = reduce_tokens(build("Llava"), "prumerge+(tokens=12)")
    seen = lengths_seen(model)
    lora = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2))
    trainer_for(lora, tmp_path).train()
    assert max(seen) == 5 + 13 + 6
    inputs = batch("Llava", ROWS)
    found = lora.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    merged = lora.merge_and_unload()
    assert merged is model
    assert torch.equal(merged.generate(**inputs, max_new_tokens=4, do_sample=False), found)


def test_sft_trainer_of_trl_trains_the_short_sequence(tmp_path):
    """trl calls the model's body by itself: whether it trains reduced shows in the length it sees alone."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from PIL import Image

    pictures = [Image.effect_noise((112, 112), 40 + 20 * i).convert("RGB") for i in range(4)]
    data = Dataset.from_list(
        [
            {
                "images": [picture],
                "prompt": f"w3 w{i + 10} <image> w5",
                "completion": f" w{i + 50} w7 w{i + 60}",
            }
            for i, picture in enumerate(pictures)
        ]
    )
    losses, lengths = {}, {}
    for spec in ("none", "prumerge+(tokens=12)"):
        model = reduce_tokens(build("Llava"), spec)
        seen = lengths_seen(model)
        arguments = trl.SFTConfig(
            tmp_path / spec[:4],
            **{"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 2e-3, "report_to": "none"},
            **{"use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "max_length": None},
        )
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=processor())
        trainer.train()
        losses[spec] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        lengths[spec] = set(seen)
    assert min(lengths["none"]) >= 64
    assert max(lengths["prumerge+(tokens=12)"]) < 64 - 12
    assert losses["prumerge+(tokens=12)"] != losses["none"]
    assert losses["prumerge+(tokens=12)"][-1] < losses["prumerge+(tokens=12)"][0]
