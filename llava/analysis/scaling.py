"""How time and memory grow with visual tokens, batch and pictures, by the roofline: three curves."""

from pathlib import Path

from llava import hardware
from llava.analysis import charts, roofline
from llava.analysis.shapes import Shape

TOKENS = (8, 16, 24, 32, 48, 64, 96, 144, 192, 256, 384, 576)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PICTURES = (1, 2, 3, 4, 5, 6, 7, 8)
COLOURS = {576: "#3b6ea8", 144: "#2b8a6e", 32: charts.ACCENT}
SHADES = {1: "#9fbddb", 2: "#4f86bd", 8: "#233f60"}


def draw(shape: Shape, gpu: hardware.Gpu, precision: roofline.Precision, text: int, out: Path) -> None:
    """Prefill per request against visual tokens, memory against batch, first token against pictures.

    Raises:
        UserError: `out` cannot be written.
    """

    from matplotlib.ticker import LogLocator

    def at(visual: int, batch: int, images: int = 1) -> roofline.Request:
        return roofline.request(shape, gpu, precision, text=text, visual=visual, batch=batch, images=images)

    figure = charts.new_figure(13, 4, layout="constrained")
    figure.suptitle(
        f"{shape.name}, {precision.name}, {text} text tokens on a {gpu.name}, by the roofline",
        x=0.01, ha="left", fontsize=12, color=charts.INK,
    )  # fmt: skip
    speed, memory, pictures = figure.subplots(1, 3)

    for batch, colour in SHADES.items():
        times = [at(visual, batch).prefill.ms / batch for visual in TOKENS]
        speed.plot(TOKENS, times, color=colour, linewidth=2, label=f"batch {batch}")
    edge = roofline.break_even(gpu, precision) - text
    if edge > TOKENS[0]:
        speed.axvline(edge, color=charts.INK, linewidth=0.9, linestyle=(0, (4, 3)))
        speed.text(
            edge * 1.06, 0.02, "break-even at batch 1", transform=speed.get_xaxis_transform(), fontsize=8.5
        )
    speed.set(xscale="log", yscale="log", xlabel="visual tokens", title="prefill, ms per request")
    speed.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    speed.yaxis.set_minor_formatter("")
    speed.set_xticks((8, 32, 144, 576), labels=("8", "32", "144", "576"))

    for visual, colour in COLOURS.items():
        totals = [at(visual, batch).weights_gb + at(visual, batch).kv_gb for batch in BATCHES]
        memory.plot(BATCHES, totals, color=colour, linewidth=2, label=f"{visual} tokens")
        times = [at(visual, 1, images).first_token_ms for images in PICTURES]
        pictures.plot(PICTURES, times, color=colour, linewidth=2, label=f"{visual} tokens")
    memory.axhline(gpu.memory_gb, color=charts.INK, linewidth=0.9, linestyle=(0, (4, 3)))
    memory.annotate(
        f"the card has {gpu.memory_gb:g}",
        (BATCHES[0], gpu.memory_gb),
        (0, 4),
        textcoords="offset points",
        fontsize=8.5,
    )
    memory.set(xscale="log", xlabel="batch", title="weights and KV cache, GB", ylim=(0, None))
    memory.set_xticks(BATCHES, labels=map(str, BATCHES))
    pictures.set(xlabel="pictures in one request", title="first token, ms", ylim=(0, None))

    for axes in (speed, memory, pictures):
        charts.tidy(axes)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.title.set(fontsize=10.5, color=charts.INK)
        axes.xaxis.label.set(fontsize=9, color=charts.FAINT)
        axes.grid(axis="y", color="#eceff3")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8.5, labelcolor=charts.INK)
    charts.save(figure, out)
