"""Self-contained HTML pages: text, sortable tables, plots and galleries."""

from tita.report.page import Card, Page, Panel, SideBySide
from tita.report.plots import add_legend, new_axes, svg

__all__ = ["Card", "Page", "Panel", "SideBySide", "add_legend", "new_axes", "svg"]
