"""Server processes on free ports with the demo models, and request bodies."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import PIL.Image
import PIL.ImageDraw

from tita.demo.models import ROLES, Role, demo_model_path

ENGINE = os.environ.get("TITA_TEST_ENGINE", "transformers")
"""The engine of the servers; `make test-vllm` runs some of the tests over the second one."""
ENGINE_ARGUMENTS, ENGINE_ENVIRONMENT, START_S = (
    ([], {}, 90)
    if ENGINE == "transformers"
    else (
        ["--engine", ENGINE, "--enforce-eager"],
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        1000,
    )
)


class Server:
    """One `tita serve` process."""

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` is a command that runs the server."""
        command = [*prefix, sys.executable, "-m", "tita", "serve", "--port", "0"]
        command += [*ENGINE_ARGUMENTS, *arguments]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | ENGINE_ENVIRONMENT | (environment or {}),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for_log(r"listening on (http://\S+)", within_s=START_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for_log(self, pattern: str, *, within_s: float = 60) -> str:
        """Wait for a pattern in the log, and return its first group."""
        ends = time.monotonic() + within_s
        while time.monotonic() < ends:
            if found := re.search(pattern, self.log):
                return found[1]
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.log}")

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def ready(self) -> "Server":
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            if httpx.get(f"{self.url}/readyz", timeout=60).status_code == 200:
                return self
            assert self.process.poll() is None, self.log
            time.sleep(0.1)
        raise AssertionError(f"not ready: {self.log}")

    def client(self, **options: object) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": START_S} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no {name} in {text}"
        return sum(map(float, found))

    def idle_within(self, seconds: float) -> bool:
        """Whether no request is running or waiting within this time."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            names = ("tita:num_requests_running", "tita:num_requests_waiting")
            if not any(self.metric(name) for name in names):
                return True
            time.sleep(0.05)
        return False

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serving(
    *arguments: str,
    environment: dict[str, str] | None = None,
    models: dict[Role, Path] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Server]:
    """A server with these models, or with the demo models."""
    found = models or {role: demo_model_path(role) for role in ROLES}
    named = [f"--{role}={path}" for role, path in found.items()]
    server = Server(*named, *arguments, environment=environment, prefix=prefix)
    try:
        yield server
    finally:
        server.close()


def picture(colour: str = "red", *, size: int = 64) -> bytes:
    image = PIL.Image.new("RGB", (size, size), "white")
    box = (size // 4, size // 4, size * 3 // 4, size * 3 // 4)
    PIL.ImageDraw.Draw(image).ellipse(box, fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(content: bytes, question: str) -> list[dict[str, object]]:
    """The messages of one question about one image."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(content)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": parts}]
