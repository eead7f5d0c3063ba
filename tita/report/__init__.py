"""Self-contained HTML pages: text, tables that sort, plots in the page's ink, galleries."""

from tita.report.page import Card, Comparison, Page, Side
from tita.report.plots import add_legend, new_axes, svg

__all__ = ["Card", "Comparison", "Page", "Side", "add_legend", "new_axes", "svg"]
