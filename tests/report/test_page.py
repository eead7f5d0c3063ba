"""Pages are self-contained, escaped, and written atomically."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tita.report import Card, Page, add_legend, new_axes, svg


def sample() -> Page:
    page = Page("Report <1>", subtitle="a & b")
    page.heading("Scores")
    page.text("<script>alert(1)</script>")
    page.table([{"model": "base", "score": 0.5}, {"model": "aligned", "score": None}])
    for slope in (1, 2):
        axes = new_axes(title="curve", xlabel="weight", ylabel="accuracy")
        axes.plot([0, 1], [0, slope])
        page.figure(axes, caption="rises")
    card = Card(title="What?", image=Image.new("RGB", (8, 8)), lines=[("base", "<b>7</b>")])
    page.gallery([card])
    return page


def test_text_is_escaped_and_images_are_embedded() -> None:
    html = sample().html()
    assert "<script>alert" not in html
    assert "&lt;b&gt;7&lt;/b&gt;" in html
    assert "Report &lt;1&gt;" in html
    references = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)


def test_plots_have_the_text_colour_and_unique_ids() -> None:
    html = sample().html()
    assert html.count("currentColor") > 10
    first, second = (
        set(re.findall(r'clipPath id="([^"]+)"', part)) for part in html.split("</svg>")[:2]
    )
    assert first
    assert not first & second


def test_same_content_gives_the_same_bytes() -> None:
    assert sample().html() == sample().html()


def test_small_numbers_are_not_rounded_to_zero() -> None:
    page = Page("Costs")
    page.table([{"cost": -0.0000123}, {"cost": 0.0}, {"cost": 0.25}], digits=2)
    assert re.findall(r"<td.*?>(.*?)</td>", page.html()) == ["-1.2e-05", "0.00", "0.25"]


def test_legends_have_the_text_colour() -> None:
    axes = new_axes()
    axes.plot([0, 1], label="line")
    add_legend(axes)
    text = svg(axes).split(">line<")[0]
    assert "currentColor" in text.rsplit("<text", 1)[1]


def test_missing_numbers_are_a_dash_in_a_numeric_column() -> None:
    html = sample().html()
    assert '<td class="number" data-value="">–</td>' in html
    assert '<td class="number" data-value="0.5">0.500</td>' in html


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    page = sample()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        page.write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"
