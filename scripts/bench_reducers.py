"""How long PruMerge takes beside the one product it cannot avoid: similarities of K kept keys with all keys.

    python scripts/bench_reducers.py [--rounds 60] [--batch 1 8] [--device cpu] [--json out.json]

One process, one CPU thread, float32, N = 576 patches, C = 1024 channels. The things compared take turns in
each round; `ratio` is that of the medians. On a CPU the clock is the thread's own, which stops while others
run; they still take cache and memory bandwidth, so measure on an idle machine. The last column is the
released code's way, a Python loop over images and kept tokens, written here for comparison.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers import VisionFeatures, build_reducer

SIDE, WIDTH = 24, 1024
PATCHES = SIDE * SIDE
# Spec, outliers planted in the features, and the patches it then keeps
CASES = [
    ("prumerge", 32, 32),
    ("prumerge(tokens=32)", 32, 32),
    ("prumerge+", 36, 144),
    ("prumerge+(tokens=144)", 36, 144),
]


def features_with_outliers(batch: int, outliers: int, device: str) -> VisionFeatures:
    """Random features whose CLS attention is even but for so many peaks, seven of them multiples of 5.

    With 36 outliers PruMerge+ samples every 5th patch, 115 of them: together 36 - 7 + 115 = 144.
    """
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, PATCHES, WIDTH, generator=generator)
    key = torch.randn(batch, PATCHES + 1, WIDTH, generator=generator)
    query = torch.randn(batch, 1, WIDTH, generator=generator)
    logits = torch.rand(batch, PATCHES + 1, 1, generator=generator)
    peaks = torch.cat([torch.arange(7) * 80, torch.arange(outliers - 7) * 15 + 1])
    logits[:, 1 + peaks] += 3  # row 0 is CLS
    along = (key * query).sum(2, keepdim=True)
    key += (logits * WIDTH**0.5 - along) * query / query.square().sum(2, keepdim=True)
    return VisionFeatures(patches.to(device), query[:, 0].to(device), key.to(device), 16, (SIDE, SIDE))


def released_style(features: VisionFeatures, kept: Tensor) -> Tensor:
    """The released loop over given kept patches [B, K]: similarities, top 32, weighted sum."""
    width = features.key.shape[2]
    attention = (features.query.unsqueeze(1) @ features.key.transpose(1, 2) * width**-0.5).softmax(-1)[
        :, 0, 1:
    ]
    key = F.normalize(features.key[:, 1:], dim=-1)
    out = []
    for image in range(kept.shape[0]):
        tokens = []
        for centre in kept[image].tolist():
            others = torch.cat([torch.arange(centre), torch.arange(centre + 1, PATCHES)]).to(kept.device)
            near = (key[image, centre] @ key[image, others].T).topk(32).indices
            near = others[near]
            weighted = features.patches[image, near] * attention[image, near].unsqueeze(-1)
            tokens.append(features.patches[image, centre] + weighted.sum(0))
        rest = attention[image].index_fill(0, kept[image], 0) @ features.patches[image]
        out.append(torch.stack([*tokens, rest]))
    return torch.stack(out)


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each function in each round; the first two rounds only warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    clock = time.thread_time if device == "cpu" else time.perf_counter
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            start = clock()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append((clock() - start) * 1e3)
    return times


def measure(spec: str, outliers: int, count: int, batch: int, rounds: int, device: str) -> dict[str, object]:
    """One row of the table."""
    features, reducer = features_with_outliers(batch, outliers, device), build_reducer(spec)
    reduced = reducer(features)
    found = (reduced.lengths - 1).tolist()
    if set(found) != {count}:
        raise SystemExit(f"{spec} kept {found} patches of the made-up features, not {count}")
    kept = reduced.kept[:, :count]
    key = features.key[:, 1:]
    own = key.gather(1, kept.unsqueeze(-1).expand(-1, -1, WIDTH)).contiguous()
    times = interleaved(
        {
            "product": lambda: torch.bmm(own, key.transpose(1, 2)),
            "reducer": lambda: reducer(features),
        },
        rounds,
        device,
    )
    slow = interleaved({"loop": lambda: released_style(features, kept)}, max(3, rounds // 10), device)["loop"]
    product, ours = statistics.median(times["product"]), statistics.median(times["reducer"])
    return {
        "reducer": reducer.spec,
        "kept": count,
        "batch": batch,
        "product_ms": round(product, 3),
        "reducer_ms": round(ours, 3),
        "ratio": round(ours / product, 2),
        "released_loop_ms": round(statistics.median(slow), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = [measure(*case, batch, args.rounds, args.device) for case in CASES for batch in args.batch]
    columns = list(rows[0])
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in columns]
    for line in [columns, *([str(row[name]) for name in columns] for row in rows)]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": args.device, "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
