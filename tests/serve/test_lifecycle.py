"""Startup errors, API keys and a full queue, with real processes."""

import concurrent.futures
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from serve_process import Server, about, picture, serving

from tita.demo.models import demo_model_path

LONG = {"model": "tita", "temperature": 2, "seed": 3, "top_p": 0.99, "max_tokens": 40}


def test_a_missing_model_is_a_one_line_error(tmp_path: Path):
    for base in (str(tmp_path / "none"), str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-m", "tita", "serve", "--port", "0", "--base", base],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("tita: ")


def test_a_port_in_use_is_an_error(server: Server):
    port = server.url.rpartition(":")[2]
    arguments = ["--port", port, "--base", str(demo_model_path("base"))]
    done = subprocess.run(
        [sys.executable, "-m", "tita", "serve", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--port" in done.stderr


def test_all_paths_but_probes_need_a_key(tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\nsecond-key\n")
    with serving("--api-keys-file", str(keys), "--no-page") as server:
        server.ready()
        for key in ("first-key", "second-key"):
            assert len(list(server.client(api_key=key).models.list())) == 2
        for key in ("third-key", "first", "first-key,second-key"):
            with pytest.raises(openai.AuthenticationError):
                server.client(api_key=key).models.list()
        for path in ("/list_models", "/worker_generate_stream"):
            assert httpx.post(server.url + path, json={}).status_code == 401
        for path in ("/healthz", "/readyz", "/metrics"):
            assert httpx.get(server.url + path).status_code == 200
        assert httpx.get(server.url).status_code == 404
        assert server.terminate() == 0
        assert "-key" not in server.log


def test_a_full_queue_returns_429_and_the_deadline_504():
    with serving("--max-batch", "1", "--max-waiting", "1", "--deadline-s", "1") as server:
        server.ready()
        # `n` takes two places, which is all the server has.
        body = LONG | {"messages": about(picture(), "describe")}
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(
                    lambda seed: httpx.post(
                        f"{server.url}/v1/chat/completions",
                        json=body | {"seed": seed, "n": 2},
                        timeout=60,
                    ),
                    range(6),
                )
            )
        statuses = {answer.status_code for answer in answers}
        assert 429 in statuses
        assert statuses <= {200, 429, 504}
        rejected = next(answer for answer in answers if answer.status_code == 429)
        assert int(rejected.headers["retry-after"]) >= 1
        assert rejected.json()["error"]["type"] == "rate_limit_error"
        assert server.idle_within(60)
