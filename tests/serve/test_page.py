"""The page at `/` in headless Chromium, driven by plain WebDriver calls (w3.org/TR/webdriver2)."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import Server, picture

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        opened = self.call("POST", "", {"capabilities": {"alwaysMatch": options}})
        self._base += f"/{opened['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def find(self, css: str) -> str:
        found = self.call("POST", "/element", {"using": "css selector", "value": css})
        return f"/element/{found[ELEMENT]}"

    def until(self, condition: str, *, within_s: float = 30) -> None:
        ends = time.monotonic() + within_s
        while not self.run(f"return {condition}"):
            assert time.monotonic() < ends, f"{condition} did not come true"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver; this machine has not both")
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        found = None
        while not found:
            line = process.stdout.readline()
            assert line, "chromedriver did not start"
            found = re.search(r"started successfully on port (\d+)", line)
        window = Browser(int(found[1]))
        yield window
        window.call("DELETE", "")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_base_and_aligned_stream_side_by_side(browser: Browser, server: Server, tmp_path: Path):
    path = tmp_path / "red.png"
    path.write_bytes(picture("red", size=1600))
    browser.call("POST", "/url", {"url": server.url})
    browser.call("POST", browser.find("#file") + "/value", {"text": str(path)})
    browser.until("!document.getElementById('preview').hidden")
    browser.run(
        "const w = document.getElementById('weight'); w.value = 0.9;"
        "w.dispatchEvent(new Event('input'));"
        "document.getElementById('question').value = 'What number is written?';"
    )
    assert browser.run("return document.getElementById('shown').textContent") == "0.90"
    browser.call("POST", browser.find("#ask") + "/click", {})
    browser.until("document.body.dataset.state === 'done'")

    def text(name: str) -> str:
        return str(browser.run(f"return document.getElementById('{name}').textContent"))

    for side in ("base", "aligned"):
        assert text(side)
        assert re.fullmatch(
            r"\d+ tokens, \d+ changed; base \d+ ms, reward \d+ ms", text(f"{side}-cost")
        )
    assert " 0 changed" in text("base-cost")
    marks = "return document.querySelectorAll('#{} mark').length"
    assert browser.run(marks.format("base")) == 0
    changed = int(text("aligned-cost").split()[2])
    # The end of the answer can be what changed, and it is no word that could be marked.
    assert changed - 1 <= browser.run(marks.format("aligned")) <= changed
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(url.startswith((server.url, "data:", "blob:")) for url in loaded)
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []


def test_a_refusal_is_told(browser: Browser, server: Server):
    browser.call("POST", "/url", {"url": server.url})
    browser.run("document.getElementById('question').value = 'what '.repeat(200)")
    browser.call("POST", browser.find("#ask") + "/click", {})
    browser.until("document.querySelectorAll('.answer.error').length === 2")
    assert "tokens" in browser.run("return document.getElementById('base').textContent")


def test_it_fits_a_phone(browser: Browser, server: Server):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
    browser.call("POST", "/goog/cdp/execute", command)
    browser.call("POST", "/url", {"url": server.url})
    assert browser.run("return document.documentElement.scrollWidth") <= 390
