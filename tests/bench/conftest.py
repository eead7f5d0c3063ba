"""Fixtures: a scripted endpoint, question files for it, and `tita-bench` as a process."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).parent / "scripted_endpoint.py"
FIRST_FIELDS = (
    "question_id", "model_name", "prompt", "response", "input_tokens", "output_tokens",
    "total_tokens", "response_time", "success", "error_message",
)  # fmt: skip
"""The fields of results files of older tools."""


@dataclass
class Scripted:
    """A running scripted endpoint."""

    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/log") as answer:
            log: list[dict[str, Any]] = json.load(answer)["log"]
        return log

    def most_open(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/log") as answer:
            return int(json.load(answer)["most_open"])

    def release(self) -> None:
        """Let it answer what it holds."""
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/release").close()

    def times_listed(self) -> int:
        """How often the list of models was asked for."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/log") as answer:
            return int(json.load(answer)["listed"])


@pytest.fixture
def start_endpoint() -> Iterator[Callable[..., Scripted]]:
    started = []

    def start(*options: str, delay: float = 0.0) -> Scripted:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), "--delay", str(delay), *options],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        return Scripted(port=int(process.stdout.readline()))

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def endpoint(start_endpoint: Callable[..., Scripted]) -> Scripted:
    return start_endpoint()


@pytest.fixture
def ask_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a question file of the given texts; each question's id is `q<number>`."""

    def write(*texts: str, name: str = "questions.jsonl", **fields: Any) -> Path:
        path = tmp_path / name
        records = ({"question_id": f"q{n}", "text": t, **fields} for n, t in enumerate(texts))
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def tita_bench() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `tita-bench` as a process."""

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from tita.cli.main import tita_bench; tita_bench()"]
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=120, **options,
        )  # fmt: skip

    return run
