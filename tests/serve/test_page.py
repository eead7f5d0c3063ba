"""The page at `/` in headless Chromium, driven by plain WebDriver calls (w3.org/TR/webdriver2)."""

import base64
import concurrent.futures
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import hosted
from serve_process import Server, picture

from tita.serve import ServeOptions
from tita.serve.loading import Models

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

    def open(self, server: Any) -> None:
        self.call("POST", "/url", {"url": str(getattr(server, "url", "") or server.base_url)})

    def cdp(self, command: str, params: dict[str, Any]) -> None:
        self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def text(self, name: str) -> str:
        return str(self.run(f"return document.getElementById('{name}').textContent"))

    def press(self, keys: str) -> None:
        """Keys one after the other, each held until all are let go."""
        actions = [
            *({"type": "keyDown", "value": key} for key in keys),
            *({"type": "keyUp", "value": key} for key in reversed(keys)),
        ]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def errors(self) -> list[str]:
        """What both sides tell after a click on Ask."""
        self.call("POST", self.find("#ask") + "/click", {})
        self.until("document.body.dataset.state === 'done'")
        return [self.text("base-error"), self.text("aligned-error")]

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

    text = browser.text
    for side in ("base", "aligned"):
        assert text(side)
        assert re.fullmatch(
            r"\d+ tokens?, \d+ changed; base \d+ ms, reward \d+ ms", text(f"{side}-cost")
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


def test_it_begins_with_what_the_server_has(browser: Browser, models: Models):
    with hosted(models, ServeOptions(weight=0.65)) as client:
        browser.open(client)
        browser.until("document.getElementById('shown').textContent === '0.65'")
        assert browser.text("base-title").endswith("/base")
        assert browser.text("aligned-title").endswith("/reward")
        forms = "return [...document.getElementById('form-name').options].map(o => o.value)"
        assert browser.run(forms) == ["", "tita", "genarm", "dpo"]


def test_the_keyboard_is_enough(browser: Browser, server: Server):
    browser.open(server)
    focus = "return document.activeElement.id || document.activeElement.parentElement.id"
    seen = []
    for _ in range(5):
        browser.press("\ue004")
        seen.append(browser.run(focus))
    assert seen == ["file", "question", "weight", "more", "ask"]
    browser.run("document.getElementById('weight').focus()")
    before = browser.text("shown")
    browser.press("\ue014")
    assert float(browser.text("shown")) > float(before)
    browser.run("document.getElementById('question').focus()")
    browser.press("\ue009\ue007")
    browser.until("document.body.dataset.state === 'done'")
    assert "changed" in browser.text("aligned-cost")


def test_an_image_is_dropped_and_removed(browser: Browser, server: Server):
    browser.open(server)
    drop = """
        const bytes = Uint8Array.from(atob("{}"), (c) => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "{}", {{ type: "image/png" }}));
        document.body.dispatchEvent(
            new DragEvent("drop", {{ dataTransfer: data, bubbles: true, cancelable: true }}));
    """
    shown = "!document.getElementById('preview').hidden"
    browser.run(drop.format(base64.b64encode(picture()).decode(), "dot.png"))
    browser.until(shown)
    assert browser.run("return document.getElementById('preview').alt") == "dot.png"
    # What cannot be read leaves the image that is there, and is told.
    browser.run(drop.format(base64.b64encode(b"no image").decode(), "broken.png"))
    browser.until("document.getElementById('hint').className === 'error'")
    assert "broken.png" in browser.text("hint")
    assert browser.run(f"return {shown}")
    browser.call("POST", browser.find("#remove") + "/click", {})
    assert not browser.run(f"return {shown}")


def test_a_refusal_is_told(browser: Browser, server: Server):
    browser.open(server)
    browser.run("document.getElementById('question').value = 'what '.repeat(200)")
    assert all("tokens" in error for error in browser.errors())


def test_a_full_server_is_told(browser: Browser, models: Models):
    gate = threading.Event()
    hold = models.base.vlm.model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
    options = ServeOptions(max_batch=1, max_waiting=0)
    body = {"model": "tita", "messages": [{"role": "user", "content": "what ?"}]}
    gate.set()
    with hosted(models, options) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        gate.clear()
        held = pool.submit(client.post, "/v1/chat/completions", json=body)
        try:
            while not _running(client):
                time.sleep(0.01)
            browser.open(client)
            assert browser.errors() == ["Too many requests are waiting; try again soon"] * 2
        finally:
            gate.set()
            hold.remove()
        assert held.result().status_code == 200


def _running(client: Any) -> bool:
    return 'tita:num_requests_running{model_name="tita"} 1.0' in client.get("/metrics").text


def test_a_server_that_went_away_is_told(browser: Browser, models: Models):
    with hosted(models) as client:
        browser.open(client)
        browser.until("document.getElementById('base-title').textContent !== 'Base'")
    assert all("cannot be reached" in error for error in browser.errors())


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(browser: Browser, server: Server, width: int):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.cdp("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.open(server)
        assert browser.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.cdp("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(browser: Browser, server: Server, scheme: str):
    """Contrast of at least 4.5, as WCAG 2.2 has it for text."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.cdp("Emulation.setEmulatedMedia", {"features": features})
    browser.open(server)
    pairs = browser.run("""
        const ground = (e) => {
            const found = getComputedStyle(e).backgroundColor;
            return found !== "rgba(0, 0, 0, 0)" ? found : ground(e.parentElement);
        };
        const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
        return [...document.querySelectorAll("h1, h2, p, label, mark, #hint, #ask, footer, .error")]
            .map((e) => [e.id || e.tagName, rgb(getComputedStyle(e).color), rgb(ground(e))]);
    """)
    assert len(pairs) > 12
    for name, ink, ground in pairs:
        darker, lighter = sorted((_luminance(ink), _luminance(ground)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


def _luminance(rgb: list[float]) -> float:
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in rgb)
    ]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
