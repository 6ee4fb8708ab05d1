"""`llava mini align`: give the projector its first meaning, in minutes of CPU and without the language model.

LLaVA's first stage teaches the projector through the language model, with 558K captions. Composed scenes know
which patch shows what, so a short cut is open: regress each projected token onto the input embeddings of the
words for what its patch shows (the thing, its colour, where it is). The language model then reads a picture
as a bag of words it knows, and LoRA only has to teach it to use them. Needs DATA/objects.jsonl of `llava
mini world`; writes OUT/mm_projector.bin for --pretrain_mm_mlp_adapter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import trange

from llava.mini.world import SIZE, Scene, read_scenes
from llava.model.checkpoints import write_tensors

TEMPERATURE = 0.07
"""Of the softmax over cosines; CLIP's initial value."""

LEARNING_RATE = 1e-3
REDUCERS = ("none", "prumerge")
"""Whose tokens the projector learns from."""

WEIGHTS = {"thing": 1.0, "color": 1.0, "side": 0.35, "height": 0.35}
"""The groups of words, a column of a label each, and how strongly its word counts in the target embedding."""

SIDES, HEIGHTS = ("left", "right"), ("top", "bottom")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder made by `llava mini world`")
    parser.add_argument("--base", type=Path, default=Path("checkpoints/mini-base"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the projector-only checkpoint")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes to read (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    scenes = read_scenes(args.data)[: args.scenes]
    things = sorted({thing.name for scene in scenes for thing in scene.objects})
    colors = sorted({thing.color for scene in scenes for thing in scene.objects if thing.color})
    embeddings = embed_words(args.base, (things, colors, SIDES, HEIGHTS))
    cut = max(1, len(scenes) // 10)
    held_out, labels_held_out = label_tokens(args, scenes[:cut], things, colors)
    tokens, labels = label_tokens(args, scenes[cut:], things, colors)
    projector = fit(tokens, labels, embeddings, args.steps, args.batch)
    write_tensors(
        {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()},
        args.out / "mm_projector.bin",
    )
    scores = accuracy(projector, held_out, labels_held_out, embeddings)
    print(json.dumps({"tokens": len(tokens), "held_out_tokens": len(held_out), "accuracy": scores}))
    return 0


@dataclass(frozen=True)
class WordEmbeddings:
    """Input embeddings of words, as differences from the mean of all embeddings.

    The mean is most of every embedding's length and says nothing; only the rest tells words apart.

    Attributes:
        groups: [words, hidden] of each group of `WEIGHTS`.
        mean: [hidden].
    """

    groups: tuple[Tensor, ...]
    mean: Tensor


def embed_words(base: Path, groups: Sequence[Sequence[str]]) -> WordEmbeddings:
    """From the language model's embedding table; a word of several pieces is the mean of them."""
    from llava.model.builder import load_tokenizer
    from llava.model.checkpoints import inspect_checkpoint, read_model_weights

    tokenizer = load_tokenizer(str(base))
    table = read_model_weights(inspect_checkpoint(base)).tensors["model.embed_tokens.weight"].float()
    mean = table.mean(dim=0)

    def embed(word: str) -> Tensor:
        return table[tokenizer(f" {word}", add_special_tokens=False).input_ids].mean(dim=0) - mean

    return WordEmbeddings(tuple(torch.stack(list(map(embed, group))) for group in groups), mean)


def label_tokens(
    args: argparse.Namespace, scenes: list[Scene], things: list[str], colors: list[str]
) -> tuple[Tensor, Tensor]:
    """Visual tokens that show something, [T, C], and their labels, [T, 4] (a column per group, -1: none)."""
    from llava.hardware import plan
    from llava.mm_utils import load_image
    from llava.model.vision_tower import load_vision_tower
    from llava.reducers import build_reducer

    hardware = plan()
    tower = load_vision_tower(args.base / "vision_tower", dtype=hardware.dtype, device=hardware.device)
    reducers = [build_reducer(spec) for spec in REDUCERS]
    tokens, labels = [], []
    with torch.inference_mode():
        for start in trange(0, len(scenes), 8, desc="tower", file=sys.stderr):
            group = scenes[start : start + 8]
            images = [load_image(args.data / scene.image) for scene in group]
            features = tower(tower.image_processor(images, return_tensors="pt")["pixel_values"])
            for reduced in (reducer(features) for reducer in reducers):
                for scene, row, kept in zip(group, reduced.tokens, reduced.kept, strict=True):
                    label = patch_labels(scene, features.grid, things, colors)[kept.cpu().clamp_min(0)]
                    shows = (kept.cpu() >= 0) & (label[:, 0] >= 0)
                    tokens.append(row.cpu()[shows].half())
                    labels.append(label[shows])
    return torch.cat(tokens), torch.cat(labels)


def patch_labels(scene: Scene, grid: tuple[int, int], things: list[str], colors: list[str]) -> Tensor:
    """[N, 4] int64: places of the words in their groups at patch centres, -1 where a patch shows nothing."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    y, x = y.flatten() / rows, x.flatten() / columns
    labels = torch.full((rows * columns, 4), -1)
    for thing in scene.objects:
        left, top, right, bottom = (side / SIZE for side in thing.box)
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        color = colors.index(thing.color) if thing.color else -1
        sides = int((left + right) / 2 > 0.5), int((top + bottom) / 2 > 0.5)
        labels[inside] = torch.tensor([things.index(thing.name), color, *sides])
    return labels


def fit(tokens: Tensor, labels: Tensor, embeddings: WordEmbeddings, steps: int, batch: int) -> nn.Module:
    """The projector after `steps` steps of AdamW with a one-cycle schedule."""
    from llava.model.projector import build_projector

    projector = build_projector("mlp2x_gelu", tokens.shape[1], len(embeddings.mean))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    with trange(steps, desc="align", file=sys.stderr) as bar:
        for step in bar:
            choice = torch.randint(len(tokens), (batch,))
            loss = alignment_loss(projector(tokens[choice].float()), labels[choice], embeddings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return projector


def alignment_loss(projected: Tensor, labels: Tensor, embeddings: WordEmbeddings) -> Tensor:
    """Squared error to the weighted sum of the words' embeddings, plus cross-entropy over cosines."""
    centred = projected - embeddings.mean
    target = torch.zeros_like(centred)
    loss = centred.new_zeros(())
    for label, words, weight in zip(labels.T, embeddings.groups, WEIGHTS.values(), strict=True):
        known = label >= 0
        target[known] += weight * words[label[known]]
        if known.any():
            cosines = normalize(centred[known], dim=-1) @ normalize(words, dim=-1).T
            loss = loss + weight * cross_entropy(cosines / TEMPERATURE, label[known])
    return loss + (centred - target).square().sum(dim=-1).mean() / target.square().sum(dim=-1).mean()


@torch.inference_mode()
def accuracy(
    projector: nn.Module, tokens: Tensor, labels: Tensor, embeddings: WordEmbeddings
) -> dict[str, float]:
    """Share of tokens whose nearest word of a group (by cosine) is the right one."""
    centred = normalize(projector(tokens.float()) - embeddings.mean, dim=-1)
    scores = {}
    for label, words, name in zip(labels.T, embeddings.groups, WEIGHTS, strict=True):
        known = label >= 0
        guess = (centred[known] @ normalize(words, dim=-1).T).argmax(dim=-1)
        scores[name] = round((guess == label[known]).float().mean().item(), 4)
    return scores
