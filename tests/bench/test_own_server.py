"""`tita-bench run` against `tita serve`, with the models of the package."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tita.bench.results_file import read_results
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The base URL of a ready `tita serve` with the models of the package."""
    log = tmp_path / "serve.log"
    command = [
        sys.executable, "-m", "tita", "serve", "--base", demo_model_path("base"),
        "--reward", demo_model_path("reward"), "--port", "0",
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield _ready(process, log)
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", log.read_text())
        try:
            if found:
                urllib.request.urlopen(f"{found[1]}/readyz", timeout=2).close()
                return f"{found[1]}/v1"
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_tita_serve_and_local_model_give_the_same_answers(
    server: str, tita_bench: Callable[..., Any], tmp_path: Path
) -> None:
    write_scenes(tmp_path, make_scenes("test", number=8), name="questions")
    common = ("--questions", tmp_path / "questions.jsonl", "--max-new-tokens", 4, "--weight", 0.3)
    common += ("--metric", "exact")
    served = tita_bench("run", *common, "--base-url", server, "--out", tmp_path / "served.jsonl")
    assert served.returncode == 0, served.stderr
    here = tita_bench(
        "run", *common, "--local-model", demo_model_path("base"),
        "--reward", demo_model_path("reward"), "--out", tmp_path / "here.jsonl",
    )  # fmt: skip
    assert here.returncode == 0, here.stderr
    one, other = (
        {record["question_id"]: record for record in read_results(tmp_path / name)}
        for name in ("served.jsonl", "here.jsonl")
    )
    assert len(one) == 24
    assert one.keys() == other.keys()
    for identity, record in one.items():
        assert record["response"] == other[identity]["response"]
        assert record["output_tokens"] == other[identity]["output_tokens"]
        assert 0 < record["time_to_first_token"] <= record["response_time"]
    assert sum(record["scores"]["exact"] for record in one.values()) > 12
