"""How long the rivals take beside the product that each cannot avoid, and beside the step as released.

    python scripts/bench_rivals.py [--rounds 15] [--batch 1 8] [--tokens 64] [--json out.json]

One process, one CPU thread, float32, N = 576 patches, C = 1024 channels, D = 4096 after the projector. The
product is that of all patches with all patches, in C channels or, where the method compares projected
patches, in D; for mmtok also that of all projected patches with the question's words. The things compared
take turns in each round; printed are medians of the thread's own clock, which stops while others run (they
still take cache and memory bandwidth: measure on an idle machine).

The last column is the greedy step as released, one image after another, written here from its description:
a full pass for each choice (scope, mmtok), products anew in each round (vispruner), all chosen rows looked
through again for each choice (divprune), one row of the factor after another (cdpruner).
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
from llava.reducers.cdpruner import relevance

SIDE, WIDTH, PROJECTED, HEADS = 24, 1024, 4096, 16
PATCHES = SIDE * SIDE


def smooth_features(batch: int) -> VisionFeatures:
    """Random fields that vary slowly over the image, plus noise: neighbours are similar."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def smooth(width: int) -> Tensor:
        field = (
            F.interpolate(draw(width, 6, 6), size=(SIDE, SIDE), mode="bilinear").flatten(2).transpose(1, 2)
        )
        return (0.8 * draw(1, width) + field + 0.4 * draw(PATCHES, width)).contiguous()

    return VisionFeatures(
        patches=smooth(WIDTH),
        query=draw(WIDTH),
        key=draw(PATCHES + 1, WIDTH),
        num_heads=HEADS,
        grid=(SIDE, SIDE),
        cls=draw(1, WIDTH),
        cls_attn=(2 * draw(HEADS, PATCHES + 1)).softmax(2)[..., 1:].contiguous(),
        block_key=draw(PATCHES + 1, WIDTH),
        projected=smooth(PROJECTED),
        attn_mid=draw(PATCHES + 1).softmax(1),
        attn_deep=draw(PATCHES + 1).softmax(1),
        image_embeds=draw(PATCHES, 768),
        text_embeds=draw(1, 768),
        text_tokens=draw(9, PROJECTED),
    )


def released_scope(f: VisionFeatures, i: int, count: int) -> list[int]:
    unit = F.normalize(f.patches[i], dim=1)
    similarity, weight = unit @ unit.T, f.cls_attn[i].sum(0)
    best = torch.zeros(PATCHES)
    chosen: list[int] = []
    for _ in range(count):
        gain = torch.clamp(similarity - best, min=0).sum(1) * weight
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, similarity[chosen[-1]])
    return chosen


def released_mmtok(f: VisionFeatures, i: int, count: int) -> list[int]:
    unit, projected, text = (F.normalize(x, dim=1) for x in (f.patches[i], f.projected[i], f.text_tokens[i]))
    words = (text @ projected.T / 0.02).softmax(1) / len(text)
    covers = torch.cat([words, 0.5 * (unit @ unit.T / 0.2).softmax(1) / PATCHES])
    best = torch.zeros(len(covers), 1)
    chosen: list[int] = []
    for _ in range(count):
        gain = torch.clamp(covers - best, min=0).sum(0)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, covers[:, chosen[-1:]])
    return chosen


def released_vispruner(f: VisionFeatures, i: int, count: int) -> list[int]:
    order, unit = f.cls_attn[i].mean(0).argsort(descending=True), F.normalize(f.patches[i], dim=1)
    important, left = order[: count // 2], order[count // 2 :]
    while len(left) > count - count // 2:
        even, odd = left[::2], left[1::2]
        score = (unit[even] @ unit[odd].T).max(1).values
        drop = min(8, len(left) - (count - count // 2))
        left = torch.cat([even[score.argsort(descending=True)[drop:]], odd])
    return torch.cat([important, left]).tolist()


def released_divprune(f: VisionFeatures, i: int, count: int) -> list[int]:
    unit = F.normalize(f.projected[i], dim=1)
    distance = 1 - unit @ unit.T
    chosen = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    for _ in range(count - 1):
        chosen.append(int(distance[chosen].min(0).values.argmax()))
    return chosen


def released_cdpruner(f: VisionFeatures, i: int, count: int) -> list[int]:
    unit, r = F.normalize(f.projected[i], dim=1), relevance(f[i : i + 1])[0]
    kernel = r[:, None] * (unit @ unit.T) * r
    left, factor, chosen = kernel.diagonal().clone(), torch.zeros(count, PATCHES), []
    for t in range(count):
        j = int(left.argmax())
        factor[t] = (kernel[j] - factor[:t, j] @ factor[:t]) / left[j].sqrt()
        left -= factor[t].square()
        left[j] = -torch.inf
        chosen.append(j)
    return chosen


GREEDY = {"scope", "vispruner", "divprune", "cdpruner", "mmtok"}
OTHERS = ("visionzip", "hiprune", "holov", "tome", "evit")


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each function, which take turns; the first two rounds only warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            if round_ >= 2:
                times[name].append((time.thread_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, features: VisionFeatures, tokens: int, rounds: int) -> dict[str, object]:
    """One row of the table; greedy methods must choose what the released step chooses."""
    reducer, batch = build_reducer(f"{name}(tokens={tokens})"), features.patches.shape[0]
    x = features.projected if name in ("divprune", "cdpruner") else features.patches
    functions: dict[str, Callable[[], object]] = {"reducer": lambda: reducer(features)}
    row: dict[str, object] = {"reducer": reducer.spec, "batch": batch}
    if name in GREEDY:
        step = globals()[f"released_{name}"]
        products = [(x, x)]
        if name == "mmtok":
            products.append((features.projected, torch.stack(list(features.text_tokens))))
        functions["product"] = lambda: [torch.bmm(a, b.transpose(1, 2)) for a, b in products]
        functions["released"] = lambda: [step(features, i, tokens) for i in range(batch)]
        same = [
            len({*step(features, i, tokens)} & {*reducer(features).kept[i].tolist()}) for i in range(batch)
        ]
        row["same_tokens"] = f"{min(same)}/{tokens}"
    ms = medians(functions, rounds)
    row["reducer_ms"] = round(ms["reducer"], 2)
    if name in GREEDY:
        row["product_ms"], row["released_ms"] = round(ms["product"], 2), round(ms["released"], 2)
        row["of_product"] = round(ms["reducer"] / ms["product"], 2)
        row["faster"] = round(ms["released"] / ms["reducer"], 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)

    columns = [
        "reducer",
        "batch",
        "reducer_ms",
        "product_ms",
        "of_product",
        "released_ms",
        "faster",
        "same_tokens",
    ]
    print("  ".join(f"{name:>{24 if name == 'reducer' else 11}}" for name in columns))
    rows = []
    for batch in args.batch:
        features = smooth_features(batch)
        for name in (*sorted(GREEDY), *OTHERS):
            rows.append(measure(name, features, args.tokens, args.rounds))
            cells = [(str(rows[-1].get(column, "")), 24 if column == "reducer" else 11) for column in columns]
            print("  ".join(f"{text:>{width}}" for text, width in cells), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
