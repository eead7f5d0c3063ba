"""Plots as SVG text that takes its ink from the page, so that they are readable in the dark too."""

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no `currentColor`; this colour stands for it and is exchanged in the SVG.
_INK = "#010203"
_LEGEND_ROW_INCHES = 0.2
_SHORT_LABEL = 28
"""Labels up to this many characters stand two in a row."""
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
    *, title: str = "", xlabel: str = "", ylabel: str = "", width: float = 5.2, height: float = 3.0
) -> "Axes":
    """Axes of a new figure in the style of our reports; width and height in inches.

    A page shows a figure as wide as a phone at the least, where the words of a wider one would be
    too small to read.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def add_legend(axes: "Axes") -> None:
    """A legend below the plot, where it covers no line; the figure grows by its height.

    In the page's ink: matplotlib forgets the style of `new_axes` once it returned.
    """
    figure: Any = axes.get_figure()
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= _SHORT_LABEL else 1
    num_rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_INCHES * num_rows)
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, frameon=False, labelcolor=_INK
    )


def svg(figure: "Figure", *, salt: str = "tita", label: str = "") -> str:
    """The figure as one `<svg>` element.

    Args:
        figure: a matplotlib figure, best one of `new_axes`.
        salt: goes into the ids inside; unlike for all figures of one page.
        label: what it shows, for those who cannot see it.
    """
    import matplotlib as mpl

    text = io.StringIO()
    # No date and a fixed salt: the same data gives the same bytes.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    if label:
        element = element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return element.replace(_INK, "currentColor")
