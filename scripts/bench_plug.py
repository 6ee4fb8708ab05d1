"""What `llava.plug` saves in prefill: a random Llava of a 7B's shapes, reduced and untouched in one run.

    python scripts/bench_plug.py --layers 2 --tower-layers 4 --rounds 5

Real widths (a language model of `llava bench --shape`, CLIP-L/14 at 336), few layers: what a small machine
can hold. The runs take turns, so that a busy machine slows all alike. `language model` is its body alone.
"""

import argparse
from dataclasses import asdict, replace
from functools import partial

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from llava import hardware
from llava.analysis import tables
from llava.analysis.latency import interleave, median_ratio, prefill_flops
from llava.analysis.shapes import CLIP_L_336, SHAPES, LanguageShape
from llava.analysis.stopwatch import CLOCKS, Spread, Stopwatch
from llava.plug import reduce_tokens, restore

IMAGE = 31999
UNTOUCHED = "untouched"


def build(language: LanguageShape, tower_layers: int, plan: hardware.Plan) -> LlavaForConditionalGeneration:
    """Random weights: time does not depend on them."""
    text = {name: value for name, value in asdict(language).items() if value is not None}
    vision = asdict(replace(CLIP_L_336, num_hidden_layers=tower_layers))
    del vision["family"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=AutoConfig.for_model(**text),
        image_token_index=IMAGE,
    )
    with torch.device(plan.device):
        return LlavaForConditionalGeneration._from_config(config, dtype=plan.dtype).eval()


@torch.no_grad()
def prefill(model: LlavaForConditionalGeneration, inputs: dict, clock, spec: str) -> tuple[int, float, float]:
    """Positions that the language model sees, ms of the whole, ms of the language model."""
    watch, body, positions, begun = Stopwatch(model.device, clock), model.model.language_model, 0, 0.0

    def start(_module, _args, kwargs) -> None:
        nonlocal positions, begun
        positions, begun = kwargs["inputs_embeds"].shape[1], watch.now()

    def stop(*_) -> None:
        watch.ms["language model"] = 1e3 * (watch.now() - begun)

    hooks = body.register_forward_pre_hook(start, with_kwargs=True), body.register_forward_hook(stop)
    if spec != UNTOUCHED:
        reduce_tokens(model, spec)
    with watch.stage("whole"):
        model(**inputs, logits_to_keep=1)
    if spec != UNTOUCHED:
        restore(model)
    for hook in hooks:
        hook.remove()
    return positions, watch.ms["whole"], watch.ms["language model"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reducers", nargs="+", default=["prumerge+(tokens=144)", "prumerge(tokens=32)"])
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the language model")
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text", type=int, default=64, help="text tokens beside the 576 of the image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time")
    parser.add_argument("--device")
    args = parser.parse_args()

    plan, language = (
        hardware.plan(args.device),
        replace(SHAPES[args.shape].language, num_hidden_layers=args.layers),
    )
    torch.manual_seed(0)
    model = build(language, args.tower_layers, plan)
    text = torch.randint(5, 31000, (1, args.text))
    ids = torch.cat([text[:, :1], torch.full((1, 576), IMAGE), text[:, 1:]], dim=1).to(plan.device)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336).to(plan.device, plan.dtype)}
    specs = [UNTOUCHED, *args.reducers]
    runs = [partial(prefill, model, inputs, CLOCKS[args.clock], spec) for spec in specs]
    measured = [list(zip(*rounds, strict=True)) for rounds in interleave(runs, args.rounds, "prefill")]

    (dense_positions, *_), *dense = measured[0]
    rows = []
    for spec, (positions, *times) in zip(specs, measured, strict=True):
        cells = [
            f"{Spread.over(ms).p50:.0f} ({median_ratio(base, ms):.2f}x)"
            for base, ms in zip(dense, times, strict=True)
        ]
        ratio = prefill_flops(language, dense_positions) / prefill_flops(language, positions[0])
        rows.append((spec, str(positions[0]), *cells, f"{ratio:.2f}x"))
    print(
        f"{plan.device}, {plan.dtype}, {torch.get_num_threads()} threads, {args.clock} time, median of "
        f"{args.rounds} rounds: {args.layers} layers of {args.shape}, {args.tower_layers} of CLIP-L, "
        f"{args.text} text tokens"
    )
    print(tables.render(("", "positions", "whole ms", "language model ms", "its FLOPs"), rows))


if __name__ == "__main__":
    main()
