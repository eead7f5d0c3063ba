"""Headless Chromium by plain WebDriver calls (w3.org/TR/webdriver2), without a client library."""

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Browser:
    """One window."""

    def __init__(self, port: int, *, width: int, dark: bool) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"args": [*arguments, *(["--force-dark-mode"] if dark else [])]}
        logging = {"browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logging}
        opened = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/{opened['sessionId']}"
        # Headless windows do not go below 500 pixels; a device's metrics do.
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, path: Path) -> None:
        self._call("POST", "/url", {"url": path.absolute().as_uri()})

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        logged = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in logged]

    def close(self) -> None:
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextmanager
def driver() -> Iterator[int]:
    """A running chromedriver; yields its port."""
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                yield int(found[1])
                return
        raise AssertionError("chromedriver did not start")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
