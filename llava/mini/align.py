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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder made by `llava mini world`")
    parser.add_argument("--base", type=Path, default=Path("checkpoints/mini-base"))
    parser.add_argument(
        "--reducers",
        nargs="+",
        default=["none", "prumerge"],
        metavar="SPEC",
        help="whose tokens to learn from",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the projector-only checkpoint")
    parser.add_argument(
        "--scenes", type=int, default=1200, help="how many scenes to read (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    scenes = read_scenes(args.data)[: args.scenes]
    embeddings, words = word_table(args.base, scenes)
    cut = max(1, len(scenes) // 10)
    held_out, labels_held_out = label_tokens(args, scenes[:cut], words)
    tokens, labels = label_tokens(args, scenes[cut:], words)
    projector = fit(tokens, labels, embeddings, words, args)
    write_tensors(
        {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()},
        args.out / "mm_projector.bin",
    )
    scores = accuracy(projector, held_out, labels_held_out, embeddings, words)
    print(json.dumps({"tokens": len(tokens), "held_out_tokens": len(held_out), "accuracy": scores}))
    return 0


@dataclass(frozen=True)
class Words:
    """The vocabulary the projector is aligned with, in three groups; index into the rows of the word table.

    A token's label has one entry per group, -1 where the patch says nothing about it.
    """

    things: tuple[str, ...]
    colors: tuple[str, ...]
    places: tuple[str, ...] = ("left", "right", "top", "bottom")

    def groups(self) -> list[slice]:
        """Rows of things, colours, (left, right), (top, bottom)."""
        a, b = len(self.things), len(self.things) + len(self.colors)
        return [slice(0, a), slice(a, b), slice(b, b + 2), slice(b + 2, b + 4)]

    def all(self) -> tuple[str, ...]:
        return self.things + self.colors + self.places


WEIGHTS = (1.0, 1.0, 0.35, 0.35)
"""How strongly each group's word shines in the target embedding."""


def word_table(base: Path, scenes: list[Scene]) -> tuple[Tensor, Words]:
    """Input embeddings of the words, minus the mean embedding, and the mean as the last row: [W + 1, hidden].

    The mean of all embeddings is most of every embedding's length and says nothing; only the rest tells words
    apart. A word of several pieces is the mean of them.
    """
    from llava.model.builder import load_tokenizer
    from llava.model.checkpoints import inspect_checkpoint, read_model_weights

    things = sorted({thing.name for scene in scenes for thing in scene.objects})
    colors = sorted({thing.color for scene in scenes for thing in scene.objects if thing.color})
    words = Words(tuple(things), tuple(colors))
    tokenizer = load_tokenizer(str(base))
    table = read_model_weights(inspect_checkpoint(base)).tensors["model.embed_tokens.weight"].float()
    mean = table.mean(dim=0)
    rows = [
        table[tokenizer(f" {w}", add_special_tokens=False).input_ids].mean(dim=0) - mean for w in words.all()
    ]
    return torch.stack([*rows, mean]), words


def label_tokens(args: argparse.Namespace, scenes: list[Scene], words: Words) -> tuple[Tensor, Tensor]:
    """Visual tokens that show something, [T, C], and their labels, [T, 4] (a column per group, -1: none)."""
    from llava.hardware import plan
    from llava.mm_utils import load_image
    from llava.model.vision_tower import load_vision_tower
    from llava.reducers import build_reducer

    hardware = plan()
    tower = load_vision_tower(args.base / "vision_tower", dtype=hardware.dtype, device=hardware.device)
    reducers = [build_reducer(spec) for spec in args.reducers]
    tokens, labels = [], []
    with torch.inference_mode():
        for start in trange(0, len(scenes), 8, desc="tower", file=sys.stderr):
            group = scenes[start : start + 8]
            images = [load_image(args.data / scene.image) for scene in group]
            features = tower(tower.image_processor(images, return_tensors="pt")["pixel_values"])
            for reduced in (reducer(features) for reducer in reducers):
                for scene, row, kept in zip(group, reduced.tokens, reduced.kept, strict=True):
                    label = patch_labels(scene, features.grid, words)[kept.cpu().clamp_min(0)]
                    shows = (kept.cpu() >= 0) & (label[:, 0] >= 0)
                    tokens.append(row.cpu()[shows].half())
                    labels.append(label[shows])
    return torch.cat(tokens), torch.cat(labels)


def patch_labels(scene: Scene, grid: tuple[int, int], words: Words) -> Tensor:
    """[N, 4] int64: thing, colour, side (0 left, 1 right), height (0 top, 1 bottom) at patch centres."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    y, x = y.flatten() / rows, x.flatten() / columns
    labels = torch.full((rows * columns, 4), -1)
    for thing in scene.objects:
        left, top, right, bottom = (side / SIZE for side in thing.box)
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        labels[inside, 0] = words.things.index(thing.name)
        labels[inside, 1] = words.colors.index(thing.color) if thing.color else -1
        labels[inside, 2] = int((left + right) / 2 > 0.5)
        labels[inside, 3] = int((top + bottom) / 2 > 0.5)
    return labels


def fit(
    tokens: Tensor, labels: Tensor, embeddings: Tensor, words: Words, args: argparse.Namespace
) -> nn.Module:
    """The projector after `args.steps` steps of AdamW with a cosine schedule."""
    from llava.model.projector import build_projector

    projector = build_projector("mlp2x_gelu", tokens.shape[1], embeddings.shape[1])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    with trange(args.steps, desc="align", file=sys.stderr) as bar:
        for step in bar:
            choice = torch.randint(len(tokens), (args.batch,))
            loss = alignment_loss(projector(tokens[choice].float()), labels[choice], embeddings, words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return projector


def alignment_loss(projected: Tensor, labels: Tensor, embeddings: Tensor, words: Words) -> Tensor:
    """Squared error to the weighted sum of the words' embeddings, plus cross-entropy over cosines."""
    table, mean = embeddings[:-1], embeddings[-1]
    centred = projected - mean
    target = torch.zeros_like(centred)
    loss = centred.new_zeros(())
    for column, (group, weight) in enumerate(zip(words.groups(), WEIGHTS, strict=True)):
        label = labels[:, column]
        known = label >= 0
        target[known] += weight * table[group][label[known]]
        if known.any():
            cosines = normalize(centred[known], dim=-1) @ normalize(table[group], dim=-1).T
            loss = loss + weight * cross_entropy(cosines / TEMPERATURE, label[known])
    return loss + (centred - target).square().sum(dim=-1).mean() / target.square().sum(dim=-1).mean()


@torch.inference_mode()
def accuracy(
    projector: nn.Module, tokens: Tensor, labels: Tensor, embeddings: Tensor, words: Words
) -> dict[str, float]:
    """Share of tokens whose nearest word of a group (by cosine) is the right one."""
    centred = normalize(projector(tokens.float()) - embeddings[-1], dim=-1)
    scores = {}
    for column, (group, name) in enumerate(
        zip(words.groups(), ("thing", "color", "side", "height"), strict=True)
    ):
        known = labels[:, column] >= 0
        guess = (centred[known] @ normalize(embeddings[:-1][group], dim=-1).T).argmax(dim=-1)
        scores[name] = round((guess == labels[known, column]).float().mean().item(), 4)
    return scores
