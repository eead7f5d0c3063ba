"""`tita-bench run` against `tita serve`, with the models of the package."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tita.bench.load_shape import ClientOptions
from tita.bench.methods import guided, parse_methods
from tita.bench.registry import resolve_endpoint
from tita.bench.request_body import GenerationOptions
from tita.bench.results_file import read_results
from tita.bench.tasks import BenchmarkTask, run_endpoint
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes

pytestmark = pytest.mark.slow


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen[bytes]]]]:
    """Start `tita serve` with the models of the package; returns its base URL and process."""
    started = []

    def start(*, reward: str = "reward", port: int = 0) -> tuple[str, subprocess.Popen[bytes]]:
        log = tmp_path / f"serve-{len(started)}.log"
        command = [
            sys.executable, "-m", "tita", "serve", "--base", demo_model_path("base"),
            "--reward", demo_model_path(reward), "--port", port,
        ]  # fmt: skip
        with log.open("w") as file:
            process = subprocess.Popen(
                [*map(str, command)],
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        started.append(process)
        return _ready(process, log), process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def server(start_server: Callable[..., Any]) -> str:
    """The base URL of a ready server."""
    url: str = start_server()[0]
    return url


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
    guided_answers = {identity: record["response"] for identity, record in one.items()}
    check_methods(server, tmp_path, guided_answers=guided_answers)


def check_methods(server: str, folder: Path, *, guided_answers: dict[str, str]) -> None:
    """The server accepts every method, and guidance is that of the option `--weight`."""
    endpoint = resolve_endpoint("tita", base_url=server)
    methods = parse_methods("vcd,m3id,cfg,tita_vcd=0.3,best-of-2,guided,reward=0.3", weights=[0.3])
    explained = replace(guided(0.7), name="explained", explain=True)
    for method in (*methods, explained):
        task = BenchmarkTask(
            questions=folder / "questions.jsonl", images=folder, metric="exact",
            out=folder / f"{method.slug}.jsonl",
            generation=GenerationOptions(max_new_tokens=4, method=method),
        )  # fmt: skip
        stats = run_endpoint(task, endpoint, options=ClientOptions())
        assert (stats.num_failed, stats.num_asked) == (0, 24), method.name
        records = {record["question_id"]: record for record in read_results(task.out)}
        if method.name in ("guided, w = 0.3", "reward=0.3"):
            found = {identity: record["response"] for identity, record in records.items()}
            assert found == guided_answers
        if method.explain:
            spans = {identity: record.get("changed", []) for identity, record in records.items()}
            assert any(spans.values())
            for identity, record in records.items():
                assert len(spans[identity]) <= record["usage"]["changed_tokens"]


def test_a_server_that_restarts_with_another_model_never_mixes_a_results_file(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    write_scenes(tmp_path, make_scenes("test", number=24), name="questions")
    base_url, first = start_server()
    out = tmp_path / "r.jsonl"
    command = [
        sys.executable, "-c", "from tita.cli.main import tita_bench; tita_bench()", "run",
        "--questions", tmp_path / "questions.jsonl", "--max-new-tokens", 4, "--weight", 0.5,
        "--base-url", base_url, "--out", out, "--rate", 6, "--concurrency", 3, "--retries", 12,
    ]  # fmt: skip
    run = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while not out.exists() or len(list(read_results(out))) < 5:
        assert run.poll() is None
        time.sleep(0.05)
    # The pod is replaced: another reward model under the same name and address.
    first.kill()
    first.wait()
    start_server(reward="base", port=int(base_url.split(":")[-1].split("/")[0]))
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 1, said
    assert "the model changed: answers now come from model" in said
    rows = list(read_results(out))
    assert 5 <= len(rows) < 72
    assert {row["success"] for row in rows} == {True}
    with urllib.request.urlopen(f"{base_url}/models") as listed:
        served = json.load(listed)["data"][0]
    assert {row["model_digest"] for row in rows} == {rows[0]["model_digest"]}
    assert rows[0]["model_digest"] != served["digest"]
    assert {row["reward_sha256"] for row in rows} == {rows[0]["reward_sha256"]}
    assert rows[0]["reward_sha256"] != served["reward"]["sha256"]
