"""Training runs on a tiny model: what is learnt, what is saved, and how a killed run goes on."""

import argparse
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import STAGES, Tiny, losses, make, prepare, silent
from torch.nn.functional import cross_entropy

from llava.cli import main as llava
from llava.constants import IGNORE_INDEX
from llava.data import length_grouped_order
from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints import read_tensors
from llava.train import save
from llava.train import trainer as trainer_module
from llava.train.arguments import parse
from llava.train.plot import read_log
from llava.train.plot import run as plot
from llava.train.setup import build
from llava.train.trainer import LlavaTrainer, epoch_order


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("tiny"))


# The loss


def test_logits_only_where_a_label_counts_give_the_same_loss_and_gradient(tiny, tmp_path):
    prepared, run = prepare(tiny, tmp_path)
    model = prepared.llava.eval()
    batch = run.data_collator([run.train_dataset[row] for row in range(4)])
    full = model(**batch)
    full.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    short = model(**batch, loss_only=True)
    short.loss.backward()
    assert short.logits is None
    assert short.loss.item() == pytest.approx(full.loss.item(), abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4)


def texts_alone(tiny: Tiny, folder: Path) -> Tiny:
    data = folder / "text.json"
    data.write_text(json.dumps([row for row in json.loads(tiny.data.read_text()) if "image" not in row]))
    return Tiny(tiny.models, data, tiny.images)


@pytest.mark.parametrize("average", ["micro_batch", "token"])
def test_how_micro_batches_are_averaged(average, tiny, tmp_path):
    """Against cross entropy by hand over the samples of one accumulated step."""
    flags = (
        f"--loss_average {average} --gradient_accumulation_steps 2 --max_steps 1 --learning_rate 0 "
        "--train_sampling_strategy sequential"
    )
    prepared, run = prepare(texts_alone(tiny, tmp_path), tmp_path / "run", flags)
    sums, counts = [], []
    for rows in ((0, 1), (2, 3)):
        batch = run.data_collator([run.train_dataset[row] for row in rows])
        targets = batch["labels"][:, 1:].flatten()
        with torch.no_grad():
            logits = prepared.llava.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        sums.append(cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item())
        counts.append(int((targets != IGNORE_INDEX).sum()))
    run.train()
    logged = next(row["loss"] for row in run.state.log_history if "loss" in row)
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    expected = {"micro_batch": sum(means) / 2, "token": sum(sums) / sum(counts)}
    assert logged == pytest.approx(expected[average], abs=1e-5)
    assert abs(expected["micro_batch"] - expected["token"]) > 1e-4  # or the test could not fail


def test_gradient_checkpointing_changes_nothing_even_with_a_frozen_projector(tiny, tmp_path):
    flags = (
        "--lora_enable True --lora_dropout 0 --freeze_mm_mlp_adapter True --max_steps 3 --save_strategy no"
    )
    plain = tiny.train(tmp_path / "plain", flags)
    saving = tiny.train(tmp_path / "saving", f"{flags} --gradient_checkpointing True")
    assert [row["loss"] for row in saving] == pytest.approx([row["loss"] for row in plain], abs=1e-5)
    assert [row["grad_norm"] for row in saving] == pytest.approx(
        [row["grad_norm"] for row in plain], rel=1e-3
    )
    assert plain[-1]["grad_norm"] > 0


# What trains


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", STAGES)
def test_what_trains_is_float32_under_mixed_precision(stage, dtype, tiny, tmp_path):
    arguments = *_, training = parse(tiny.argv(tmp_path, STAGES[stage]), silent)
    training.bf16, training.fp16 = dtype is torch.bfloat16, dtype is torch.float16  # a CPU refuses --fp16
    dtypes = {True: set(), False: set()}
    for parameter in build(*arguments, silent).model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {dtype}}


def test_samples_that_teach_nothing_leave_the_weights_alone(tiny, tmp_path):
    """A batch whose labels are all masked has no mean; it must not make NaN of the gradients of others."""
    prepared, run = prepare(tiny, tmp_path)
    empty, other = (run.data_collator([run.train_dataset[row]]) for row in (0, 1))
    empty["labels"] = torch.full_like(empty["labels"], IGNORE_INDEX)
    model = prepared.llava.eval()
    model(**other, loss_only=True).loss.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model(**empty, loss_only=True).loss.backward()
    assert alone
    for name, gradient in alone.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_should_train_changes(stage, tiny, tmp_path):
    prepared, run = prepare(
        tiny, tmp_path, f"{STAGES[stage]} --max_steps 2 --save_strategy no --learning_rate 0.1"
    )
    before = {name: parameter.detach().clone() for name, parameter in prepared.model.named_parameters()}
    run.train()
    changed = {n for n, p in prepared.model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert changed == trainable
    assert any("mm_projector" in name for name in changed)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--vision_tower", "--pretrain_mm_mlp_adapter"])
def test_a_start_that_cannot_be_trained_is_refused(flag, tiny, tmp_path):
    argv = tiny.argv(tmp_path)
    if flag == "--model_name_or_path":
        argv += [flag, str(tiny.models.lora)]
    elif flag == "--vision_tower":
        argv = [word for word in argv if word not in (flag, str(tiny.models.tower))]
    else:
        argv += ["--mm_projector_type", "linear", flag, str(tiny.models.projector / "mm_projector.bin")]
    with pytest.raises(UserError, match=flag):
        build(*parse(argv, silent), silent)


@pytest.mark.parametrize(
    "flags", ["--version v0", "--mm_use_im_patch_token True", "--mm_use_im_start_end True"]
)
def test_new_tokens_get_the_mean_of_the_old_rows(flags, tiny, tmp_path):
    prepared, _ = prepare(tiny, tmp_path, flags)
    old, new = tiny.models.vocab_size, len(prepared.tokenizer)
    # The tiny tokenizer has no pad token of its own in v0's sense.
    assert new - old == (2 if "start_end" in flags else 1)
    for table, name in (
        (prepared.llava.get_input_embeddings().weight, "model.embed_tokens.weight"),
        (prepared.llava.lm_head.weight, "lm_head.weight"),
    ):
        assert len(table) == new
        mean = tiny.models.language_model[name].mean(0)
        torch.testing.assert_close(table[old:].detach(), mean.expand(new - old, -1))
    assert prepared.llava.config.vocab_size == new


def test_qlora_trains_on_a_quantized_model(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = (
        "--bits 4 --lora_enable True --lora_r 4 --bf16 True --max_steps 4 --save_steps 2 --learning_rate 1e-2"
    )
    prepared, _ = prepare(tiny, tmp_path / "other", flags)
    kinds = {type(module).__name__ for module in prepared.llava.get_model().layers.modules()}
    assert "Linear4bit" in kinds
    vision = [
        *prepared.llava.get_vision_tower().modules(),
        *prepared.llava.get_model().mm_projector.modules(),
    ]
    assert not any("4bit" in type(module).__name__ for module in [*vision, prepared.llava.lm_head])
    rows = tiny.train(tmp_path / "run", flags)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = tiny.train(tmp_path / "run", flags)
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], abs=1e-5)


# What is saved


@pytest.mark.parametrize("stage", STAGES)
def test_results_and_checkpoints_load_and_answer_alike(stage, tiny, tmp_path):
    """The run's folder and its last checkpoint, through the loader everyone uses."""
    flags = f"{STAGES[stage]} --max_steps 2 --save_steps 2 --reducer prumerge"
    prepared, run = prepare(tiny, tmp_path, flags)
    run.train()
    run.save_model()
    batch = run.data_collator([run.train_dataset[row] for row in (0, 1)])
    batch.pop("labels")
    with torch.no_grad():
        expected = prepared.model.eval()(**batch).logits
    base = None if stage == "full" else str(tiny.models.base)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        _, model, _, _ = load_pretrained_model(
            str(folder), base, "llava", device="cpu", torch_dtype=torch.float32
        )
        assert model.config.mm_token_reducer == "prumerge"
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_half_precision_run_leaves_half_precision_weights(tiny, tmp_path):
    tiny.train(tmp_path, f"{STAGES['full']} --bf16 True --max_steps 1 --save_steps 1")
    final = read_tensors(tmp_path / "model.safetensors")
    exact = read_tensors(tmp_path / "checkpoint-1" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert final[name].dtype == torch.bfloat16
    assert exact[name].dtype == torch.float32
    assert torch.equal(exact[name].bfloat16(), final[name])
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


# Going on


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_in(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, after: bool = False
) -> None:
    """Let the `call`-th call of a function be the last thing that happens."""
    original = getattr(owner, name)
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapper)


MOMENTS = {
    # where the kill falls: owner, function, which call, before or after it; steps done by then that count
    "before anything is saved": (LlavaTrainer, "training_step", 2, False, 0),
    "in a step": (LlavaTrainer, "training_step", 10, False, 4),
    "while weights are written": (save, "save_tokenizer", 2, False, 2),
    "after the weights": (save, "write_model", 2, True, 2),
    "before the random state": (LlavaTrainer, "_save_rng_state", 2, False, 2),
    "before the rename": (save, "publish", 2, False, 2),
    "after the rename": (save, "publish", 2, True, 4),
    "before the old one is deleted": (trainer_module, "rotate_checkpoints", 2, False, 4),
    "before the result is saved": (LlavaTrainer, "save_state", 1, False, 6),
}


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stage that nothing disturbs: six steps over two epochs, and its final folder."""
    folders = {}
    for stage in STAGES:
        folders[stage] = tmp_path_factory.mktemp(f"whole-{stage}")
        tiny.train(folders[stage], f"{STAGES[stage]} {RESUMABLE}")
    return folders


RESUMABLE = "--max_steps 6 --save_steps 2 --save_total_limit 1 --gradient_accumulation_steps 2"


def assert_same_run(ours: Path, whole: Path) -> None:
    for key in ("loss", "grad_norm", "learning_rate", "step", "epoch"):
        assert [row[key] for row in losses(ours)] == [row[key] for row in losses(whole)], key
    names = {path.name for path in whole.glob("*.safetensors")} | {path.name for path in whole.glob("*.bin")}
    compared = 0
    for name in names - {"training_args.bin"}:
        ours_, theirs = read_tensors(ours / name), read_tensors(whole / name)
        assert ours_.keys() == theirs.keys()
        assert all(torch.equal(ours_[key], theirs[key]) for key in theirs)
        compared += 1
    assert compared


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        *(("lora", moment) for moment in MOMENTS),
        *itertools.product(("projector", "full"), ("in a step", "after the weights", "before the rename")),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    stage, moment, tiny, uninterrupted, tmp_path, monkeypatch
):
    owner, name, call, after, counts = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_in(patch, owner, name, call, after)
        with pytest.raises(Killed):
            tiny.train(tmp_path, f"{STAGES[stage]} {RESUMABLE}")
    found = save.last_checkpoint(tmp_path)
    assert (0 if found is None else int(found.name.rpartition("-")[2])) == counts
    tiny.train(tmp_path, f"{STAGES[stage]} {RESUMABLE}")
    assert_same_run(tmp_path, uninterrupted[stage])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_that_was_cut_short_is_never_taken(tiny, tmp_path):
    """Every file of a checkpoint missing, empty or shorter: then the one before it is taken."""
    tiny.train(tmp_path, f"{STAGES['lora']} --max_steps 2 --save_steps 1")
    whole = tmp_path / "checkpoint-2"
    assert save.last_checkpoint(tmp_path) == whole
    files = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert len(files) >= 8
    for path, content in files.items():
        if path.name == save.FILE_LIST:
            continue
        for damaged in (None, b"", content[: len(content) // 2], content[:-1]):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            said: list[str] = []
            assert save.last_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-1", path
            assert "checkpoint-2" in said[0]
            path.write_bytes(content)
    assert save.last_checkpoint(tmp_path) == whole


def test_a_checkpoint_of_another_stage_is_refused(tiny, tmp_path):
    tiny.train(tmp_path, f"{STAGES['full']} --max_steps 1 --save_steps 1")
    with pytest.raises(UserError, match="output_dir"):
        tiny.train(tmp_path, f"{STAGES['lora']} --max_steps 2 --save_steps 1")


def test_the_checkpoint_asked_for_is_taken(tiny, tmp_path):
    flags = f"{STAGES['lora']} --max_steps 3 --save_steps 1"
    whole = tiny.train(tmp_path / "a", flags)
    again = tiny.train(tmp_path / "b", f"{flags} --resume_from_checkpoint {tmp_path / 'a' / 'checkpoint-2'}")
    assert [row["loss"] for row in again] == [whole[2]["loss"]]
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        tiny.train(tmp_path / "c", f"{flags} --resume_from_checkpoint {tmp_path / 'a'}")


def test_training_goes_on_from_a_lora(tiny, tmp_path):
    """The new run starts with the weights of the old one's result."""
    first, run = prepare(tiny, tmp_path / "a", f"{STAGES['lora']} --max_steps 2")
    run.train()
    run.save_model()
    start = f"--lora_weight_path {tmp_path / 'a'}"
    wanted = dict(first.model.named_parameters())
    for tokens in ("", "--mm_use_im_patch_token True"):  # a token more than the first run's vocabulary
        second, _ = prepare(tiny, tmp_path / "b", f"{STAGES['lora']} {start} {tokens}")
        trains = {name: p for name, p in second.model.named_parameters() if p.requires_grad}
        assert any("lora_B" in name and p.any() for name, p in trains.items())
        for name, parameter in trains.items():
            assert torch.equal(parameter, wanted[name]), name
    other_rank = "--lora_enable True --lora_r 2 --lora_alpha 8"
    for flags in (f"{other_rank} {start}", start, f"{STAGES['lora']} --lora_weight_path {tiny.models.base}"):
        with pytest.raises(UserError, match="--lora_weight_path"):
            prepare(tiny, tmp_path / "c", flags)


# The order of the samples


def test_the_order_follows_from_the_seed_alone():
    lengths = [5, -3, 8, -2, 9, 4, -7, 6, 3, -1]
    grouping = {"batch_size": 2, "world_size": 1, "by_modality": True}
    for options in ({}, {"lengths": lengths, **grouping}):
        orders = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(orders) * 17)  # whatever the state around it is
            state = torch.get_rng_state()
            orders.append(epoch_order(10, seed, **options))
            assert torch.equal(torch.get_rng_state(), state)
        assert orders[0] == orders[1] != orders[2]
        assert sorted(orders[2]) == list(range(10))
    torch.manual_seed(2)
    assert orders[2] == length_grouped_order(lengths, 2, 1)


# Watching it


def test_a_log_line_says_what_went_through(tiny, tmp_path):
    flags = f"{STAGES['lora']} --max_steps 1 --per_device_train_batch_size 10 --save_strategy no"
    _, run = prepare(tiny, tmp_path, flags)
    batch = run.data_collator([run.train_dataset[row] for row in range(10)])
    [row] = tiny.train(tmp_path, flags)
    seconds = 10 / row["samples_per_second"]
    assert row["visual_tokens_per_image"] == 16  # 56 / 14 squared
    assert row["visual_tokens_per_second"] * seconds == pytest.approx(6 * 16)
    text = int(batch["attention_mask"].sum()) - 6
    assert row["text_tokens_per_second"] * seconds == pytest.approx(text)
    assert row["memory_gib"] > 0.05
    assert {"loss", "learning_rate", "grad_norm", "step", "epoch", "time"} <= row.keys()


def test_text_alone_counts_no_visual_tokens(tiny, tmp_path):
    flags = f"{STAGES['full']} --max_steps 1 --per_device_train_batch_size 4 --save_strategy no"
    [row] = texts_alone(tiny, tmp_path).train(tmp_path / "run", flags)
    assert row["visual_tokens_per_second"] == 0
    assert "visual_tokens_per_image" not in row


def test_a_run_writes_down_what_it_was(tiny, tmp_path):
    tiny.train(tmp_path, f"{STAGES['lora']} --max_steps 1 --save_strategy no --reducer prumerge+")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["model"]["mm_token_reducer"] == "prumerge+"
    assert content["training"]["lora_r"] == 4
    assert content["data"]["data_path"] == str(tiny.data)
    assert content["versions"]["torch"] == torch.__version__
    assert any("LoRA: trains" in line for line in content["notes"])


def test_unusable_samples_are_reported_at_the_end(tiny, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(tiny.images, images)
    (images / "3.png").write_bytes(b"no picture")
    broken = Tiny(tiny.models, tiny.data, images)
    flags = f"{STAGES['projector']} --num_train_epochs 1 --save_strategy no --dataloader_num_workers 1"
    with pytest.raises(UserError, match=r"^\S+ row 3 \(id i3\): \S+3\.png is not an image"):
        broken.train(tmp_path / "run", flags)
    assert len(broken.train(tmp_path / "run", f"{flags} --on_bad_sample skip")) == 5
    report = "unusable samples met and replaced by others: 1 (rows 3)"
    assert report in capsys.readouterr().err
    assert report in json.loads((tmp_path / "run/run.json").read_text())["notes"]


def test_a_log_cut_short_is_read_and_plotted(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": s, "loss": 2 / s, "samples_per_second": 3.0}) for s in range(1, 6)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    assert len(read_log(tmp_path / "a" / "log.jsonl")) == 5
    args = argparse.Namespace(runs=[tmp_path / "a", tmp_path / "b"], out=tmp_path / "x.png")
    assert plot(args) == 0
    from PIL import Image

    picture = Image.open(tmp_path / "x.png")
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    with pytest.raises(UserError, match="--output_dir"):
        plot(argparse.Namespace(runs=[tmp_path], out=None))


# The command


def test_llava_train_takes_every_flag(tiny, tmp_path, capsys):
    assert llava(["train", *tiny.argv(tmp_path, "--max_steps 1 --save_strategy no")]) == 0
    assert (tmp_path / "model.safetensors").is_file()
    assert llava(["train", "--help"]) == 0
    assert "--mm_token_reducer" in capsys.readouterr().out
    assert llava(["train", *tiny.argv(tmp_path, "--fp16 True --bf16 True")]) == 2
    assert "--bf16" in capsys.readouterr().err
