"""transformers' Trainer, with what LLaVA does differently: the order of the samples, the optimizer's groups,
how the loss is averaged, what a checkpoint holds, and what is logged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data import length_grouped_order
from llava.reducers import Reducer
from llava.train import save
from llava.train.arguments import TrainingArguments
from llava.train.log import JsonlLog, peak_memory
from llava.train.setup import Prepared


def epoch_order(size: int, seed: int, lengths: list[int] | None = None, **grouping: Any) -> list[int]:
    """A random order of the samples that follows from the seed alone, so that a resumed run sees the same.

    Args:
        lengths: one per sample, to group by; None: not grouped.
        grouping: batch_size, world_size and by_modality of `length_grouped_order`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if lengths is None:
            return torch.randperm(size).tolist()
        return length_grouped_order(lengths, **grouping)


def draw_reducers(choices: Sequence[Reducer], batches: int, seed: int, epoch: int) -> list[Reducer]:
    """One of `choices` for each batch of an epoch: the same on every rank, and in a resumed run."""
    draws = np.random.default_rng([seed, epoch]).integers(len(choices), size=batches)
    return [choices[draw] for draw in draws]


class OrderedSampler(Sampler[Any]):
    """The keys of the samples in the order that `order()` returns when an epoch begins."""

    def __init__(self, size: int, order: Callable[[], Sequence[Any]]):
        self.size, self.order = size, order

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order())


class LlavaTrainer(Trainer):
    """Trains a `Prepared` model.

    Args:
        prepared: the model, as `llava.train.setup.build` made it.
        args: TrainingArguments of this package.
        train_dataset: samples; `lengths` and `modality_lengths` are asked for only where batches are grouped.
        data_collator: samples to the keywords of the model's forward.
    """

    args: TrainingArguments

    def __init__(
        self, prepared: Prepared, args: TrainingArguments, train_dataset: Dataset, data_collator: Any
    ):
        self.prepared = prepared
        self._projected = 0  # visual tokens of the batch
        # Since the last log line: samples, text tokens, images, visual tokens. Kept on the device until then.
        self._seen = torch.zeros(4, dtype=torch.int64, device=args.device)
        self._since = time.perf_counter()
        super().__init__(
            model=prepared.model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=prepared.tokenizer,
        )
        # LLaVA averages the means of micro batches; transformers 5 would count tokens over all of them.
        self.model_accepts_loss_kwargs = args.loss_average == "token"
        prepared.llava.config.use_cache = True  # for whoever loads it; `compute_loss` says False for training
        prepared.llava.get_model().mm_projector.register_forward_hook(self._count_visual_tokens)
        self.add_callback(JsonlLog(Path(args.output_dir)))

    # Order of the samples

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> OrderedSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args, size = self.args, len(dataset)
        lengths = None
        if args.group_by_modality_length:
            lengths = dataset.modality_lengths
        elif args.train_sampling_strategy == "group_by_length":
            lengths = dataset.lengths

        def order() -> list[int] | list[tuple[int, Reducer]]:
            # After a resumption in the middle of an epoch `state.epoch` is a fraction.
            epoch = int((self.state.epoch or 0) + 1e-6)
            seed = args.seed if args.data_seed is None else args.data_seed
            if lengths is None and args.train_sampling_strategy == "sequential":
                rows = list(range(size))
            else:
                rows = epoch_order(
                    size,
                    seed + epoch,
                    lengths,
                    batch_size=args.train_batch_size,
                    world_size=args.world_size * args.gradient_accumulation_steps,
                    by_modality=args.group_by_modality_length,
                )
            choices = self.prepared.reducers
            if len(choices) == 1:
                return rows
            # A device's batch draws as one: samples of 16 and of 576 visual tokens in it would be padding.
            batch = args.train_batch_size
            drawn = draw_reducers(choices, -(-size // batch), seed, epoch)
            return [(row, drawn[place // batch]) for place, row in enumerate(rows)]

        return OrderedSampler(size, order)

    # Optimizer

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None):
        """What `create_optimizer` makes the optimizer of: its class, its options, and LLaVA's groups."""
        cls, options = super().get_optimizer_cls_and_kwargs(args, model)
        options.setdefault("params", parameter_groups(model, args))
        if self.is_deepspeed_enabled and args.hf_deepspeed_config.is_offload():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            cls = DeepSpeedCPUAdam  # vectorised, where the states now lie

            options.pop("fused", None)
        return cls, options

    # Loss

    def _count_visual_tokens(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._projected += output.shape[:-1].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        self._projected = 0
        inputs = {**inputs, "use_cache": False, "loss_only": True}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs["attention_mask"].bool()
        images = ((inputs["input_ids"] == IMAGE_TOKEN_INDEX) & mask).sum()
        # Without images one row passes through the projector to keep it in the graph.
        visual = torch.where(images > 0, self._projected, 0)
        self._seen += torch.stack([images.new_tensor(len(mask)), mask.sum() - images, images, visual])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds throughput over all processes, and one process's peak of memory, to lines with a loss."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._since
            samples, text, images, visual = self.accelerator.reduce(self._seen, reduction="sum").tolist()
            self._seen.zero_()
            self._since = time.perf_counter()
            logs["samples_per_second"] = samples / seconds
            logs["text_tokens_per_second"] = text / seconds
            logs["visual_tokens_per_second"] = visual / seconds
            if images:
                logs["visual_tokens_per_image"] = visual / images
            logs["memory_gib"] = peak_memory(self.args.device) / 2**30
        super().log(logs, start_time)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        out = Path(output_dir or self.args.output_dir)
        save.write_model(self, self.prepared, out, final=not _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer makes checkpoint-N: a folder of its own, until it is complete."""
        return f"{self.args.output_dir}/{save.STAGING}checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside and rename it when it is complete; then delete the oldest ones."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
            save.publish(Path(self._get_output_dir(trial)) / name, run / name)
            rotate_checkpoints(str(run), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            save.read_model(self.prepared, Path(resume_from_checkpoint))


def parameter_groups(model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]]:
    """The optimizer's groups, in LLaVA's order: [decay, no decay]; with `mm_projector_lr` these two for the
    rest, then for the projector. Biases and the weights of norms have no decay."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for projector in (False,) if args.mm_projector_lr is None else (False, True):
        for decay in (True, False):
            group = {"params": [], "weight_decay": args.weight_decay if decay else 0.0}
            groups[projector, decay] = group | ({"lr": args.mm_projector_lr} if projector else {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projector = args.mm_projector_lr is not None and "mm_projector" in name
            groups[projector, "norm" not in name and "bias" not in name]["params"].append(parameter)
    return list(groups.values())
