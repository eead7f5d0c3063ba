"""Plots as SVG in the text colour of the page, so that they are readable in dark mode."""

import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A placeholder, replaced in the SVG by `currentColor`, which matplotlib does not know.
_TEXT_COLOR = "#010203"
_LEGEND_ROW_INCHES = 0.2
_SHORT_LABEL = 28
"""A legend with longer labels has one column instead of two."""
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _TEXT_COLOR,
    "axes.grid": True,
    "axes.labelcolor": _TEXT_COLOR,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.family": "sans-serif",
    "grid.alpha": 0.15,
    "grid.color": _TEXT_COLOR,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _TEXT_COLOR,
    "xtick.color": _TEXT_COLOR,
    "ytick.color": _TEXT_COLOR,
}


def new_axes(
    *, title: str = "", xlabel: str = "", ylabel: str = "", width: float = 5.2, height: float = 3.0
) -> "Axes":
    """Return axes of a new figure in the style of the reports; width and height in inches.

    The default width is readable on a phone.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def add_legend(axes: "Axes") -> None:
    """Add a legend below the plot; the figure grows by its height.

    Sets the text colour again, because the style of `new_axes` only applied while it ran.
    """
    figure: Any = axes.get_figure()
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= _SHORT_LABEL else 1
    num_rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_INCHES * num_rows)
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        labelcolor=_TEXT_COLOR,
    )


def svg(axes: "Axes", *, salt: str = "tita", label: str = "") -> str:
    """Return the figure of the axes as one `<svg>` element.

    Args:
        axes: matplotlib axes, preferably of `new_axes`.
        salt: part of the element ids; must differ between the figures of a page.
        label: alternative text for screen readers.
    """
    import matplotlib as mpl

    figure: Any = axes.get_figure()
    text = io.StringIO()
    # No date and a fixed salt: the same data gives the same bytes.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        # Text stays text, and the browser has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    if label:
        element = element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return element.replace(_TEXT_COLOR, "currentColor")
