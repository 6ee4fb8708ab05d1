"""How unevenly the CLS token attends to patches, over a set of pictures: what PruMerge rests on.

    python scripts/attention_sparsity.py PICTURES ... [--vision-tower DIR] [--out attention-sparsity.png]

PICTURES are files or folders. Printed and drawn: which share of the attention to patches the most attended
ones hold, and how many patches are outliers (above Q3 + 1.5 (Q3 - Q1)), picture by picture. Without
--vision-tower the small model's, which `llava mini prepare` builds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava import hardware
from llava.analysis import charts
from llava.mm_utils import expand2square, load_image, mean_colour
from llava.model.vision_tower import load_vision_tower
from llava.reducers.prumerge import outlier_fence

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--vision-tower", type=Path, default=Path("checkpoints/mini-base/vision_tower"))
    parser.add_argument("--out", type=Path, default=Path("attention-sparsity.png"))
    args = parser.parse_args()
    charts.check_name(args.out, "--out")
    files = [f for p in args.pictures for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    files = [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]

    tower = load_vision_tower(args.vision_tower, device=hardware.plan().device)
    processor: Any = tower.image_processor
    curves, outliers = [], []
    for file in tqdm(files, desc="pictures"):
        square = expand2square(load_image(file), mean_colour(processor))
        features = tower(processor.preprocess(square, return_tensors="pt")["pixel_values"])
        # PruMerge's score: one softmax over CLS and patches, query and key as one wide head; CLS dropped.
        logits = (features.key.double() @ features.query.double().unsqueeze(2)).squeeze(2)
        attention = (logits * features.key.shape[2] ** -0.5).softmax(1)[0, 1:].sort(descending=True).values
        outliers.append(int((attention > outlier_fence(attention)).sum()))
        curves.append(attention.cumsum(0) / attention.sum())
    held, counts = torch.stack(curves), torch.tensor(outliers, dtype=torch.float)

    print(f"{len(files)} pictures, {held.shape[1]} patches each")
    for share in SHARES:
        top = held[:, max(1, round(share * held.shape[1])) - 1]
        print(
            f"  the {share:4.0%} most attended patches hold {top.mean():5.1%} of the attention "
            f"({top.min():.1%} to {top.max():.1%})"
        )
    print(
        f"  outliers: {counts.mean():.1f} patches ({counts.min():.0f} to {counts.max():.0f}), "
        f"{counts.mean() / held.shape[1]:.1%} of all"
    )

    figure = charts.new_figure(9.5, 3.6, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    ranks = 100 * torch.arange(1, held.shape[1] + 1) / held.shape[1]
    low, middle, high = 100 * held.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=held.dtype), dim=0)
    left.fill_between(
        ranks, low, high, color=charts.ACCENT, alpha=0.18, linewidth=0, label="9 of 10 pictures"
    )
    left.plot(ranks, middle, color=charts.ACCENT, label="median picture")
    left.plot(ranks, ranks, color=charts.FAINT, linestyle=(0, (4, 3)), linewidth=0.9, label="even attention")
    left.set(
        xlim=(0, 100), ylim=(0, 101), xlabel="% of patches, most attended first", ylabel="% of CLS attention"
    )
    left.legend(frameon=False, fontsize=9, loc="lower right")
    right.hist(counts.numpy(), bins=24, color=charts.INK, alpha=0.75)
    right.set(xlabel="outliers: patches PruMerge keeps", ylabel="pictures")
    for axes in (left, right):
        charts.tidy(axes)
    charts.save(figure, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
