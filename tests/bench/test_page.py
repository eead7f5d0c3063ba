"""`report.html` in headless Chromium: sorting, no network, small screens, dark mode."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tita.bench.benchmark_report import write_report
from tita.bench.chat_response import Reply
from tita.bench.evaluate import evaluate
from tita.bench.results_file import ResultsFile, answer_record
from tita.bench.sample import write_sample
from tita.report import Page
from tita.storage.manifest import sha256_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver; this machine lacks them",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    items = write_sample(folder / "questions.jsonl", num=20)
    for weight in (0.0, 0.3, 1.0):
        run = {"model_name": "m", "weight": weight}
        run["questions_sha256"] = sha256_of(folder / "questions.jsonl")
        with ResultsFile(folder / f"m_{weight}.jsonl", run=run) as results:
            for number, item in enumerate(items):
                right = number % 5 < 2 + 3 * weight
                reply = Reply(
                    text=item.references[0] if right else "<b>wrong</b>",
                    response_time_s=1 + weight + number / 100,
                )
                results.append(answer_record(item, reply, attempts=1, run=run))
    write_report(evaluate(folder), folder=folder, images=folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browsers() -> Iterator[Any]:
    path = Path(__file__).parent / "browser.py"
    spec = importlib.util.spec_from_file_location("bench_browser", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    opened = []

    def start(*, width: int = 1200, dark: bool = False) -> Any:
        browser = module.Browser(port, width=width, dark=dark)
        opened.append(browser)
        return browser

    with module.driver() as port:
        yield start
        for browser in opened:
            browser.close()


def test_tables_sort_and_nothing_is_loaded_from_elsewhere(browsers: Any, report: Path) -> None:
    browser = browsers()
    browser.open(report)
    column = """
        const table = document.querySelector('table');
        const names = [...table.tHead.rows[0].cells].map(cell => cell.innerText);
        const index = names.indexOf('mean ms');
        table.tHead.rows[0].cells[index].querySelector('button').click();
        table.tHead.rows[0].cells[index].querySelector('button').click();
        return [...table.tBodies[0].rows].map(row => Number(row.cells[index].dataset.value));
    """
    values = browser.run(column)
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3
    assert browser.complaints() == []
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_dates_and_gaps_sort_too(browsers: Any, tmp_path: Path) -> None:
    page = Page("t")
    days = ("2026-11-09", None, "2026-02-10", "2026-11-10")
    page.table([{"run": f"w={n}", "day": day} for n, day in enumerate(days)])
    page.write(tmp_path / "page.html")
    browser = browsers()
    browser.open(tmp_path / "page.html")
    click = """
        document.querySelectorAll('th button')[1].click();
        return [...document.querySelectorAll('td:last-child')].map(cell => cell.innerText);
    """
    assert browser.run(click) == ["2026-02-10", "2026-11-09", "2026-11-10", "–"]
    assert browser.run(click) == ["2026-11-10", "2026-11-09", "2026-02-10", "–"]


def test_plots_and_images_are_drawn_and_answers_are_text(browsers: Any, report: Path) -> None:
    browser = browsers()
    browser.open(report)
    assert browser.run("return document.querySelectorAll('figure svg').length") >= 3
    widths = browser.run("""
        const images = [...document.images];
        images.forEach(image => { image.loading = 'eager'; });
        const decoded = Promise.all(images.map(image => image.decode()));
        return decoded.then(() => images.map(image => image.naturalWidth));
    """)
    assert browser.run("return [...document.images].every(image => image.alt.length > 5)")
    assert len(widths) >= 3
    assert min(widths) > 50
    assert browser.run("return document.querySelectorAll('.card b').length") == 0
    assert "<b>wrong</b>" in browser.run("return document.querySelector('.gallery').innerText")


def test_on_a_phone_tables_scroll_and_the_page_does_not(browsers: Any, report: Path) -> None:
    browser = browsers(width=390)
    browser.open(report)
    assert browser.run("return window.innerWidth") == 390
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    # The first column stays visible, and the text of plots is large enough.
    first = """
        const scroll = document.querySelector('.scroll');
        scroll.scrollLeft = 200;
        return [scroll.scrollLeft, scroll.querySelector('td').getBoundingClientRect().left];
    """
    scrolled, left = browser.run(first)
    assert scrolled > 0
    assert 0 <= left < 20
    smallest = """
        const words = [...document.querySelectorAll('figure svg text')];
        return Math.min(...words.map(word => word.getBoundingClientRect().height));
    """
    assert browser.run(smallest) >= 9


def test_dark_and_light_are_readable(browsers: Any, report: Path) -> None:
    brightness = """
        const style = getComputedStyle(document.body);
        const of = colour => colour.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0);
        return [of(style.backgroundColor), of(style.color)];
    """
    for dark in (False, True):
        browser = browsers(dark=dark)
        browser.open(report)
        paper, ink = browser.run(brightness)
        assert (paper < ink) == dark
        assert abs(paper - ink) > 450
