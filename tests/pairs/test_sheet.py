"""The contact sheet in headless Chromium, on a phone, in light and dark mode."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bench.browser import Browser, driver
from tests.pairs.workers import start
from tita.data import read_pairs
from tita.storage import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver; this machine lacks them",
    ),
]

_LUMINANCE = """
    const [r, g, b] = getComputedStyle(arguments_).COLOR.match(/[\\d.]+/g).map(Number);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
"""


def luminance(browser: Browser, element: str, property: str) -> float:
    found: Any = browser.run(_LUMINANCE.replace("arguments_", element).replace("COLOR", property))
    return float(found)


def test_the_contact_sheet_shows_pairs_side_by_side(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    start(tmp_path, environment, distortions=["diffusion", "crop"], noise="seva").succeed()
    tree = store.pull_tree("pairs/r")
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    with driver() as port:
        for dark in (False, True):
            browser = Browser(port, width=390, dark=dark)
            browser.open(tree / "contact_sheet.html")
            decode = "[...document.images].map(i => { i.loading = 'eager'; return i.decode(); })"
            browser.run(f"return Promise.all({decode})")
            shown = browser.run("""
                const left = image => image.getBoundingClientRect().left;
                const top = image => image.getBoundingClientRect().top;
                return [...document.querySelectorAll('.comparisons .card')].map(card => ({
                    title: card.querySelector('h3').innerText,
                    captions: [...card.querySelectorAll('figcaption')].map(c => c.innerText),
                    lefts: [...card.querySelectorAll('img')].map(left),
                    tops: [...card.querySelectorAll('img')].map(top),
                    sizes: [...card.querySelectorAll('img')].map(i => i.naturalWidth),
                }))
            """)
            assert [card["title"] for card in shown] == [pair.question for pair in pairs]
            for card, pair in zip(shown, pairs, strict=True):
                assert card["captions"] == [f"chosen\n{pair.chosen}", f"rejected\n{pair.rejected}"]
                assert card["tops"][0] == card["tops"][1]
                assert 0 < card["lefts"][0] < card["lefts"][1] < 390
                assert min(card["sizes"]) > 0
            assert browser.run("return document.documentElement.scrollWidth") <= 390
            paper = luminance(browser, "document.body", "backgroundColor")
            text = luminance(browser, "document.querySelector('figcaption')", "color")
            assert (text - paper if dark else paper - text) > 120
            assert browser.complaints() == []
            browser.close()
