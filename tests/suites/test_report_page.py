"""A suite's report in headless Chromium: verdict, filters, marked words; and 50,000 answers."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.bench.browser import Browser, driver
from tita.bench.methods import BASE, Method, guided
from tita.suites.catalog import SETS
from tita.suites.comparison import MethodRun, SetRuns
from tita.suites.scorers import ScoredQuestion
from tita.suites.suite_report import make_report, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver; this machine lacks them",
    ),
]
WORDS = [
    "the",
    "image",
    "shows",
    "a",
    "man",
    "and",
    "two",
    "dogs",
    "near",
    "an",
    "old",
    "red",
    "table",
    "</script><b>x</b>",
]
DOG = "\U0001f415"
"""One character, of which JavaScript counts two."""
METHODS = [BASE, guided(0.1), guided(0.3), guided(0.3, control="before DPO", reward="before")]


def wrong(draw: random.Random) -> str:
    return " ".join([DOG, *draw.choices(WORDS, k=20)])


def runs_of(name: str, folder: Path, *, per_method: int, methods: list[Method]) -> SetRuns:
    """Answers of which about 60 % are right, and more of those that are guided."""
    draw = random.Random(name)
    scorer = SETS[name].scorer
    runs = {}
    for method in methods:
        share = 0.9 if method.weight and not method.control else 0.6
        questions = [
            ScoredQuestion(
                id=f"{name}-{n}", metric="exact", references=("right",), image=f"{n % 4}.png",
                answer="right" if draw.random() < share else wrong(draw),
                changed=((0, 3),) if method.weight and name == "gqa" else (),
            )
            for n in range(per_method)
        ]  # fmt: skip
        scored = scorer.score(questions, folder=folder)
        runs[method.name] = MethodRun(
            method=method, scored=scored, num_answered=per_method,
            cost={"seconds": 1.0, "output tokens": 9.0},
            prompts={question.id: f"What is in {question.id}?" for question in questions},
        )  # fmt: skip
    return SetRuns(
        name=name, title=SETS[name].title, source="", scorer=scorer, folder=folder, images=folder,
        runs=runs, num_questions=per_method,
    )  # fmt: skip


def write(folder: Path, *, names: list[str], per_method: int) -> Path:
    for n in range(4):
        PIL.Image.new("RGB", (300, 200), (60 * n, 90, 120)).save(folder / f"{n}.png")
    sets = [runs_of(name, folder, per_method=per_method, methods=METHODS) for name in names]
    write_report(make_report(sets, METHODS), folder=folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with driver() as number:
        yield number


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("report"), names=["textvqa", "gqa"], per_method=150)


def cards(browser: Any) -> list[str]:
    found: list[str] = browser.run(
        "return [...document.querySelectorAll('#flipped .flag')].map((flag) => flag.textContent)"
    )
    return found


def choose(browser: Any, name: str, value: str) -> None:
    event = "input" if name == "words" else "change"
    browser.run(
        f"const c = document.querySelector('.filters [name={name}]'); c.value = '{value}';"
        f"c.dispatchEvent(new Event('{event}'))"
    )


def test_filters_of_the_gallery(port: int, page: Path) -> None:
    browser = Browser(port, width=1200, dark=False)
    try:
        browser.open(page)
        verdict = browser.run("return document.querySelector('.verdict').textContent")
        assert verdict.startswith("guided, w = 0.")
        assert "is better than the base on TextVQA" in verdict
        assert len(cards(browser)) == 24
        browser.run("document.querySelector('.more').click()")
        assert len(cards(browser)) == 48
        choose(browser, "set", "1")
        choose(browser, "side", "-1")
        assert set(cards(browser)) == {"lost: GQA"}
        choose(browser, "words", "in gqa-1")
        shown = browser.run(
            "return [...document.querySelectorAll('.question')].map((q) => q.textContent)"
        )
        assert shown
        assert all(text.startswith("What is in gqa-1") for text in shown)
        marks = "return [...document.querySelectorAll('#flipped dd:nth-of-type(2) mark')]"
        assert {text[:2] for text in browser.run(f"{marks}.map((mark) => mark.textContent)")} == {
            f"{DOG} "
        }
        assert set(browser.run(f"{marks}.map((mark) => [...mark.textContent].length)")) == {3}
        # Words of an answer are text, never HTML, and those that differ are marked.
        choose(browser, "words", "</script>")
        assert browser.run("return document.querySelectorAll('#flipped b').length") == 0
        assert browser.run("return document.querySelectorAll('#flipped mark').length") > 0
        assert browser.complaints() == []
    finally:
        browser.close()


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone(port: int, page: Path, dark: bool) -> None:
    browser = Browser(port, width=390, dark=dark)
    try:
        browser.open(page.with_name("report.zh.html") if dark else page)
        wide = "return document.documentElement.scrollWidth > window.innerWidth"
        assert not browser.run(wide)
        assert browser.run("return document.documentElement.lang") == ("zh" if dark else "en")
    finally:
        browser.close()


@pytest.mark.soak
def test_50000_answers_over_twelve_sets(port: int, tmp_path: Path) -> None:
    plain = [name for name, each in SETS.items() if each.scorer is SETS["gqa"].scorer]
    names = [*plain, "mmstar", "realworldqa", "mmmu", "mme", "mmbench"][:12]
    assert len(names) == 12
    page = write(tmp_path, names=names, per_method=1042)
    assert page.stat().st_size < 15e6
    browser = Browser(port, width=1200, dark=False)
    try:
        browser.open(page)
        # What takes time is the number of elements: answers become some when they are shown.
        assert len(cards(browser)) == 24
        assert browser.run("return document.querySelectorAll('*').length") < 6_000
    finally:
        browser.close()
