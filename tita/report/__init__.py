"""Self-contained HTML pages: text, tables that sort, plots in the page's ink, galleries."""

from tita.report.page import Card, Page
from tita.report.plots import add_legend, new_axes, svg

__all__ = ["Card", "Page", "add_legend", "new_axes", "svg"]
