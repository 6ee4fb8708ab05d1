"""One look for all drawings of this package, and one way to write them."""

from pathlib import Path

from llava.errors import UserError
from llava.files import replacing_file

INK, FAINT, RULE, ACCENT = "#22262b", "#8a9099", "#c9ced6", "#d9480f"

FORMATS = (".png", ".svg", ".pdf", ".jpg")


def check_name(out: Path, flag: str) -> None:
    """Refuses a name that says no format, before anything long begins.

    Raises:
        UserError: the suffix is none of `FORMATS`.
    """
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{flag} {out}: the name must end in {', '.join(FORMATS)}.")


def new_figure(width: float, height: float, dpi: float = 140, **options):
    """An empty matplotlib figure of so many inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def tidy(axes) -> None:
    """No frame but the rule below; quiet ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    axes.tick_params(labelsize=8.5, colors=FAINT, length=0, which="both")


def save(figure, out: Path) -> None:
    """Writes the figure, making folders; no half picture is left.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        with replacing_file(out) as partial:
            figure.savefig(partial, format=out.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}.") from error
