"""Headless Chromium, driven over WebDriver (w3.org/TR/webdriver2)."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

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

    def write(self, css: str, text: str) -> None:
        """Type into a field."""
        self.call("POST", self.find(css) + "/value", {"text": text})

    def cdp(self, command: str, params: dict[str, Any]) -> None:
        self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def text(self, name: str) -> str:
        return str(self.run(f"return document.getElementById('{name}').textContent"))

    def press(self, keys: str) -> None:
        """Press keys one after another, then release them in reverse order."""
        actions = [
            *({"type": "keyDown", "value": key} for key in keys),
            *({"type": "keyUp", "value": key} for key in reversed(keys)),
        ]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def errors(self) -> list[str]:
        """Click on Ask and return the error messages of both columns."""
        self.call("POST", self.find("#ask") + "/click", {})
        self.until("document.body.dataset.state === 'done'")
        return [self.text("base-error"), self.text("aligned-error")]

    def until(self, condition: str, *, within_s: float = 90) -> None:
        ends = time.monotonic() + within_s
        while not self.run(f"return {condition}"):
            assert time.monotonic() < ends, f"{condition} did not come true"
            time.sleep(0.05)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser window; skips the test if Chromium is not installed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
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
