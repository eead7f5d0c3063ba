"""Plots as SVG text that takes its ink from the page, so that they are readable in the dark too."""

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no `currentColor`; this colour stands for it and is exchanged in the SVG.
_INK = "#010203"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.family": "sans-serif",
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def new_axes(
    *, title: str = "", xlabel: str = "", ylabel: str = "", width: float = 6.4, height: float = 3.4
) -> "Axes":
    """Axes of a new figure in the style of our reports; width and height in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def add_legend(axes: "Axes", **options: Any) -> None:
    """A legend in the page's ink: matplotlib forgets the style of `new_axes` once it returned."""
    axes.legend(frameon=False, labelcolor=_INK, **options)


def svg(figure: "Figure", *, salt: str = "tita") -> str:
    """The figure as one `<svg>` element.

    Args:
        figure: a matplotlib figure, best one of `new_axes`.
        salt: goes into the ids inside; unlike for all figures of one page.
    """
    import matplotlib as mpl

    text = io.StringIO()
    # No date and a fixed salt: the same data gives the same bytes.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(_INK, "currentColor")
