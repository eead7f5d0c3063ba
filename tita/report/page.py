"""Builds one self-contained HTML file: style, script, plots and images are embedded."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tita.records import IMAGE_FORMATS
from tita.report.plots import svg
from tita.storage.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

_SMALL_SIDE = 160
"""Images with at most this many pixels per side are enlarged without smoothing."""
_SHORT_TEXT = 32
"""Text with at most this many characters is not wrapped on a wide screen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One item of a gallery: an image, a title, and labelled lines."""

    title: str
    image: "Image | str | Path | None" = None
    lines: Sequence[tuple[str, str]] = ()
    flag: str = ""
    tone: Literal["", "good", "bad"] = ""
    """The colour of `flag`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """An image with a labelled text, one side of a comparison."""

    label: str
    text: str
    image: "Image | str | Path"
    tone: Literal["", "good", "bad"] = ""
    """The colour of `label`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Panels beside each other, also on small screens, with one title."""

    title: str
    panels: Sequence[Panel]
    note: str = ""


class Page:
    """A page that is built from top to bottom. All text is escaped."""

    def __init__(self, title: str, *, subtitle: str = "", language: str = "en") -> None:
        self.title = title
        self._language = language
        self._styles: list[str] = []
        self._scripts: list[str] = []
        self._parts = [f"<h1>{escape(title)}</h1>"]
        self._num_figures = 0
        if subtitle:
            self._parts.append(f'<p class="subtitle">{escape(subtitle)}</p>')

    def heading(self, text: str, *, level: int = 2) -> None:
        """Start a section, or with level 3 a subsection."""
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        columns: Sequence[str] | None = None,
        caption: str = "",
        digits: int = 3,
        digits_of: Mapping[str, int] | None = None,
    ) -> None:
        """Add a table that sorts by a click on a column.

        None is shown as a dash; a small number that would round to zero keeps two digits.

        Args:
            rows: cells by column name.
            columns: the columns, in order; default: those of the first row.
            caption: text below the table.
            digits: decimal places of floats.
            digits_of: decimal places of single columns.
        """
        decimals = digits_of or {}
        names = list(columns or (rows[0] if rows else ()))
        numeric = {name: all(_is_number(row.get(name)) for row in rows) for name in names}
        head = "".join(_heading(name, numeric=numeric[name]) for name in names)
        body = "".join(
            "<tr>"
            + "".join(
                _cell(row.get(name), numeric=numeric[name], digits=decimals.get(name, digits))
                for name in names
            )
            + "</tr>"
            for row in rows
        )
        # Not <caption>, which is as narrow as the table and scrolls with it.
        note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(
            f'<figure><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{note}</figure>"
        )

    def figure(self, axes: "Axes", *, caption: str = "") -> None:
        """Add the figure of matplotlib axes as inline SVG."""
        self._num_figures += 1
        drawing = svg(axes, salt=f"figure-{self._num_figures}", label=caption)
        note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f'<figure><div class="scroll">{drawing}</div>{note}</figure>')

    def gallery(self, cards: Sequence[Card]) -> None:
        """Add cards in as many columns as fit on the screen."""
        self._parts.append(f'<div class="gallery">{"".join(map(_card, cards))}</div>')

    def side_by_side(self, comparisons: Sequence[SideBySide]) -> None:
        """Add comparisons in as many columns as fit on the screen."""
        body = "".join(map(_side_by_side, comparisons))
        self._parts.append(f'<div class="comparisons">{body}</div>')

    def embed(self, html: str, *, style: str = "", script: str = "") -> None:
        """Add HTML as it is, which the caller has escaped, with its style and script."""
        self._parts.append(html)
        self._styles.append(style)
        self._scripts.append(script)

    def html(self) -> str:
        """Return the complete HTML."""
        style, script = (
            resources.files("tita.report").joinpath(name).read_text(encoding="utf-8")
            for name in ("page.css", "page.js")
        )
        style += "".join(self._styles)
        script += "".join(self._scripts)
        return (
            f'<!doctype html>\n<html lang="{self._language}">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + f"\n<script>\n{script}</script>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page atomically."""
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _heading(name: str, *, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    return f'<th{kind} scope="col"><button type="button">{escape(name)}</button></th>'


def _cell(value: Any, *, numeric: bool, digits: int) -> str:
    kind = ' class="number"' if numeric else ""
    if value is None:
        return f'<td{kind} data-value="">–</td>'
    if isinstance(value, float):
        shown = f"{value:.{digits}f}"
        if value and not float(shown):  # rounds to zero
            shown = f"{value:.2g}"
        return f'<td{kind} data-value="{value!r}">{shown}</td>'
    text = str(value)
    if not numeric and len(text) <= _SHORT_TEXT:
        kind = ' class="short"'
    return f"<td{kind}>{escape(text)}</td>"


def _card(card: Card) -> str:
    image = "" if card.image is None else _image(card.image, alt=card.title)
    flag = f'<div class="flag {card.tone}">{escape(card.flag)}</div>' if card.flag else ""
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in card.lines)
    return f'<div class="card">{image}<h3>{escape(card.title)}</h3>{flag}<dl>{lines}</dl></div>'


def _side_by_side(comparison: SideBySide) -> str:
    note = f'<p class="note">{escape(comparison.note)}</p>' if comparison.note else ""
    sides = "".join(
        f"<figure>{_image(panel.image, alt=f'{comparison.title} ({panel.label})', max_side=480)}"
        f'<figcaption><span class="flag {panel.tone}">{escape(panel.label)}</span> '
        f"{escape(panel.text)}</figcaption></figure>"
        for panel in comparison.panels
    )
    title = escape(comparison.title)
    return f'<div class="card"><h3>{title}</h3>{note}<div class="sides">{sides}</div></div>'


def _image(image: "Image | str | Path", *, alt: str, max_side: int = 640) -> str:
    import PIL.Image

    opened = (
        PIL.Image.open(image, formats=IMAGE_FORMATS)
        if isinstance(image, str | Path)
        else image.copy()
    )
    small = max(opened.size) <= _SMALL_SIDE
    opened.thumbnail((max_side, max_side))
    kind, options = ("png", {}) if small else ("jpeg", {"quality": 80})
    data = io.BytesIO()
    opened.convert("RGB").save(data, kind, **options)
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    pixels = ' class="pixels"' if small else ""
    width, height = opened.size
    return (
        f'<img{pixels} alt="{escape(alt)}" src="{source}" loading="lazy" '
        f'width="{width}" height="{height}">'
    )
