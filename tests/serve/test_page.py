"""The page at `/`, in headless Chromium."""

import base64
import concurrent.futures
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import traffic
from chromium import Browser, chromium
from in_process import hosted
from path_proxy import proxied
from serve_process import Server, picture, serving

from tita.align import Guidance
from tita.align.forms import FORMS
from tita.demo.models import copy_with_context
from tita.serve import ServeOptions
from tita.serve.api_keys import APIKeys
from tita.serve.model_loading import LoadedModels


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as window:
        yield window


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
    # A changed end-of-text token has no text to mark.
    assert changed - 1 <= browser.run(marks.format("aligned")) <= changed
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(url.startswith((server.url, "data:", "blob:")) for url in loaded)
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []


def test_it_shows_the_servers_defaults(browser: Browser, models: LoadedModels):
    with hosted(models, ServeOptions(guidance=Guidance(weight=0.65))) as client:
        browser.open(client)
        browser.until("document.getElementById('shown').textContent === '0.65'")
        assert browser.text("base-title").endswith("/base")
        assert browser.text("aligned-title").endswith("/reward")
        forms = "return [...document.getElementById('form-name').options].map(o => o.value)"
        assert browser.run(forms) == ["", *FORMS]


def test_it_can_be_used_with_the_keyboard(browser: Browser, server: Server):
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


def test_an_image_can_be_dropped_and_removed(browser: Browser, server: Server):
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
    # A file that is not an image is reported, and the previous image stays.
    browser.run(drop.format(base64.b64encode(b"no image").decode(), "broken.png"))
    browser.until("document.getElementById('hint').className === 'error'")
    assert "broken.png" in browser.text("hint")
    assert browser.run(f"return {shown}")
    browser.call("POST", browser.find("#remove") + "/click", {})
    assert not browser.run(f"return {shown}")


def test_dropping_something_else_is_an_error_but_text_can_be_dragged(
    browser: Browser, server: Server
):
    browser.open(server)
    drag = """
        const data = new DataTransfer();
        data.setData("text/uri-list", "https://example.org/cat.png");
        const event = new DragEvent(
            "drop", {{ dataTransfer: data, bubbles: true, cancelable: true }});
        document.querySelector("{}").dispatchEvent(event);
        return event.defaultPrevented;
    """
    assert not browser.run(drag.format("#question"))
    assert "Drop an image" in browser.text("hint")
    assert browser.run(drag.format("#drop"))
    assert "not a file" in browser.text("hint")


def test_missing_and_wrong_keys_are_reported(browser: Browser, models: LoadedModels):
    with hosted(
        models, ServeOptions(keys=APIKeys("right-key"), guidance=Guidance(weight=0.65))
    ) as client:
        browser.open(client)
        # The field for the key is shown at once.
        browser.until("document.getElementById('more').open")
        assert browser.text("key-error") == "This server requires an API key. Enter it under More."
        assert browser.errors() == [browser.text("key-error")] * 2
        assert browser.run("return document.getElementById('key').checkVisibility()")
        browser.write("#key", "wrong-key\t")
        browser.until("document.getElementById('key-error').textContent.includes('not valid')")
        assert browser.errors() == [browser.text("key-error")] * 2
        browser.run("document.getElementById('key').value = ''")
        browser.write("#key", "right-key\t")
        browser.until("document.getElementById('shown').textContent === '0.65'")
        assert browser.text("key-error") == ""
        assert browser.errors() == ["", ""]
        assert "changed" in browser.text("aligned-cost")
        forms = "return [...document.getElementById('form-name').options].map(o => o.value)"
        assert browser.run(forms) == ["", *FORMS]


def test_stop_cancels_both_requests(browser: Browser, models: LoadedModels):
    gate, step_s = threading.Event(), 0.0

    def wait(*_: Any) -> None:
        gate.wait(60)
        time.sleep(step_s)

    hold = models.models.base.model.register_forward_pre_hook(wait)
    gate.set()
    with hosted(models) as client:
        gate.clear()
        try:
            browser.open(client)
            browser.until("document.getElementById('base-title').textContent !== 'Base'")
            browser.call("POST", browser.find("#ask") + "/click", {})
            while not _load(client):
                time.sleep(0.01)
            browser.call("POST", browser.find("#stop") + "/click", {})
            browser.until("document.body.dataset.state === 'done'")
            # Slow steps: the server detects the disconnect before an answer is complete.
            step_s = 0.2
            gate.set()
            while _load(client):
                time.sleep(0.01)
        finally:
            gate.set()
            hold.remove()
        assert [browser.text(f"{side}-cost") for side in ("base", "aligned")] == ["stopped"] * 2
        assert [browser.text(f"{side}-error") for side in ("base", "aligned")] == ["", ""]
        assert browser.run("return document.getElementById('stop').disabled")
        assert browser.run("return document.querySelectorAll('[aria-busy=true]').length") == 0
        assert 'outcome="stop"} 0.0' in client.get("/metrics").text
        # The next request is answered.
        assert browser.errors() == ["", ""]
        assert "changed" in browser.text("base-cost")


def _load(client: Any) -> float:
    """Number of running and waiting requests."""
    found = re.findall(r"^tita:num_requests_\w+{.*} (\S+)$", client.get("/metrics").text, re.M)
    return sum(map(float, found))


def test_a_server_that_dies_during_a_stream_is_reported(browser: Browser, tmp_path: Path):
    with serving("--max-batch", "1", models=copy_with_context(tmp_path)) as server:
        server.ready()
        # This request runs, so that those of the page have started and are waiting.
        body = traffic.body(1, max_tokens=3500, ignore_eos=True, stream=True)
        holder = traffic.start(server, body)
        while not server.metric("tita:num_requests_running"):
            time.sleep(0.01)
        browser.open(server)
        browser.until("document.getElementById('base-title').textContent !== 'Base'")
        browser.call("POST", browser.find("#ask") + "/click", {})
        while server.metric("tita:num_requests_waiting") < 2:
            time.sleep(0.01)
        server.process.kill()
        browser.until("document.body.dataset.state === 'done'")
        holder.close()
    errors = [browser.text(f"{side}-error") for side in ("base", "aligned")]
    assert all("ended early" in error for error in errors), errors


def test_an_error_response_is_shown(browser: Browser, server: Server):
    browser.open(server)
    browser.run("document.getElementById('question').value = 'what '.repeat(200)")
    assert all("tokens" in error for error in browser.errors())


def test_a_full_queue_is_shown(browser: Browser, models: LoadedModels):
    gate = threading.Event()
    hold = models.models.base.model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
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


def test_an_unreachable_server_is_reported(browser: Browser, models: LoadedModels):
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
def test_text_has_enough_contrast(browser: Browser, server: Server, scheme: str):
    """At least 4.5, as WCAG 2.2 requires for text."""
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


@pytest.mark.parametrize("strip", [True, False])
def test_it_works_below_a_path_prefix(browser: Browser, models: LoadedModels, strip: bool):
    options = ServeOptions(root_path="/models/tita")
    browser.call("POST", "/se/log", {"type": "browser"})  # of earlier tests
    with (
        hosted(models, options) as client,
        proxied(str(client.base_url).rstrip("/"), "/models/tita", strip=strip) as url,
    ):
        for address in (url, f"{url}/"):
            browser.call("POST", "/url", {"url": address})
            browser.run("document.getElementById('question').value = 'describe';")
            browser.call("POST", browser.find("#ask") + "/click", {})
            browser.until("document.body.dataset.state === 'done'")
            assert browser.text("aligned")
            loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
            assert all(each.startswith((url, "data:")) for each in loaded), loaded
        assert browser.call("POST", "/se/log", {"type": "browser"}) == []
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tita"
        assert httpx.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/models/tita"}]


def test_without_a_known_prefix_a_slash_at_the_end_is_enough(
    browser: Browser, models: LoadedModels
):
    with (
        hosted(models) as client,
        proxied(str(client.base_url).rstrip("/"), "/x", strip=True) as url,
    ):
        browser.call("POST", "/url", {"url": f"{url}/"})
        browser.run("document.getElementById('question').value = 'describe';")
        browser.call("POST", browser.find("#ask") + "/click", {})
        browser.until("document.body.dataset.state === 'done'")
        assert browser.text("aligned")
