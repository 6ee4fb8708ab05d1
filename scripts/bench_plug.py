"""What `llava.plug` saves in prefill: a random Llava of a 7B's shapes, reduced and untouched in one run.

    python scripts/bench_plug.py --layers 2 --tower-layers 4 --rounds 5

Real widths (hidden 4096, CLIP-L/14 at 336), few layers: what a small machine can hold. The rounds are
interleaved, so that a busy machine slows all alike; the median counts. `language model` is its body alone.
"""

import argparse
import statistics

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from llava import hardware
from llava.analysis.stopwatch import Stopwatch
from llava.plug import reduce_tokens, restore


def build(width: int, layers: int, tower_layers: int, plan: hardware.Plan) -> LlavaForConditionalGeneration:
    """Random weights: time does not depend on them."""
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11008 // 4096,
        num_attention_heads=max(1, width // 128),
        num_hidden_layers=layers,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=tower_layers,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=31999, dtype=plan.dtype)
    with torch.device(plan.device), no_init_weights():
        model = LlavaForConditionalGeneration._from_config(config, dtype=plan.dtype).eval()
    noise = 0.02 * torch.randn(1 << 20, device=plan.device)
    for parameter in model.parameters():  # the same noise over and over: drawing a billion takes longer
        for part in parameter.data.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
    return model


def flops(model: LlavaForConditionalGeneration, positions: int) -> float:
    """Of the language model's body: two for each weight and position, and both products of attention."""
    body = model.model.language_model
    weights = sum(p.numel() for p in body.layers.parameters())
    return 2 * weights * positions + 4 * len(body.layers) * positions**2 * body.config.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reducers", nargs="+", default=["prumerge+(tokens=144)", "prumerge(tokens=32)"])
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    parser.add_argument("--width", type=int, default=4096, help="of the language model: 4096 is a 7B")
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text", type=int, default=64, help="text tokens beside the 576 of the image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()

    plan = hardware.plan(arguments.device)
    torch.manual_seed(0)
    model = build(arguments.width, arguments.layers, arguments.tower_layers, plan)
    text = torch.randint(5, 31000, (1, arguments.text))
    ids = torch.cat([text[:, :1], torch.full((1, 576), 31999), text[:, 1:]], dim=1).to(plan.device)
    pixels = torch.randn(1, 3, 336, 336).to(plan.device, plan.dtype)

    now = Stopwatch(plan.device).now
    body, started, positions = model.model.language_model, [0.0], [0]
    parts: dict[str, list[float]] = {}

    def start(_module, _args, kwargs) -> None:
        positions[0] = kwargs["inputs_embeds"].shape[1]
        started[0] = now()

    body.register_forward_pre_hook(start, with_kwargs=True)
    body.register_forward_hook(lambda *_: parts["language"].append(now() - started[0]))

    names = ["untouched", *arguments.reducers]
    times = {name: {"whole": [], "language": []} for name in names}
    seen: dict[str, int] = {}
    with torch.no_grad():
        for round_number in range(arguments.rounds + 1):
            for name in names:
                if name != "untouched":
                    reduce_tokens(model, name)
                parts = times[name] if round_number else {"whole": [], "language": []}  # the first warms up
                begun = now()
                model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
                parts["whole"].append(now() - begun)
                seen[name] = positions[0]
                if name != "untouched":
                    restore(model)

    median = {name: {part: statistics.median(t) for part, t in times[name].items()} for name in names}
    print(
        f"{plan.device}, {plan.dtype}, {torch.get_num_threads()} threads: {arguments.layers} layers "
        f"{arguments.width} wide, {arguments.tower_layers} of CLIP-L, {arguments.text} text tokens, "
        f"median of {arguments.rounds}"
    )
    print(f"{'':24}{'positions':>10}{'whole ms':>16}{'language model ms':>24}{'its FLOPs':>12}")
    for name in names:
        cells = [
            f"{median[name][part] * 1000:.0f} ({median['untouched'][part] / median[name][part]:.2f}x)"
            for part in ("whole", "language")
        ]
        ratio = flops(model, seen["untouched"]) / flops(model, seen[name])
        print(f"{name:24}{seen[name]:>10}{cells[0]:>16}{cells[1]:>24}{ratio:>11.2f}x")


if __name__ == "__main__":
    main()
