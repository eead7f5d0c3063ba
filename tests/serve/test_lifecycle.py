"""Starting, leaving, being full, being left: real processes and real signals."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from serve_process import Server, about, picture, serving

from tita.demo.models import demo_model_path

LONG = {"model": "tita", "temperature": 2, "seed": 3, "top_p": 0.99, "max_tokens": 40}


def test_a_missing_model_ends_in_one_line(tmp_path: Path):
    for base in (str(tmp_path / "none"), str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-m", "tita", "serve", "--port", "0", "--base", base],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("tita: ")


def test_a_port_in_use_is_said(server: Server):
    port = server.url.rpartition(":")[2]
    arguments = ["--port", port, "--base", str(demo_model_path("base"))]
    done = subprocess.run(
        [sys.executable, "-m", "tita", "serve", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--port" in done.stderr


def test_keys_guard_all_but_probes(tmp_path: Path):
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


def test_a_full_queue_says_429_and_the_deadline_504():
    with serving("--max-batch", "1", "--max-waiting", "1", "--deadline-s", "0.1") as server:
        server.ready()
        # `n` takes two places, which is all there is.
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
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert server.idle_within(5)


def test_sigterm_lets_running_answers_end():
    with serving("--grace-s", "30") as server:
        server.ready()
        streams = [
            server.client().chat.completions.create(
                **LONG | {"seed": seed}, messages=about(picture(), "describe"), stream=True
            )
            for seed in range(6)
        ]
        begun = [next(iter(stream)) for stream in streams]
        assert all(begun)
        server.process.send_signal(signal.SIGTERM)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            ends = list(pool.map(lambda stream: list(stream)[-1], streams))
        assert all(end.choices[0].finish_reason in ("stop", "length") for end in ends)
        assert server.process.wait(timeout=30) == 0


def test_a_leaving_server_refuses_new_requests():
    with serving("--grace-s", "2") as server:
        server.ready()
        with httpx.Client() as kept:
            assert kept.get(f"{server.url}/readyz").status_code == 200
            os.kill(server.process.pid, signal.SIGTERM)
            time.sleep(0.05)
            refused = kept.get(f"{server.url}/readyz")
            assert refused.status_code == 503
            answer = kept.post(f"{server.url}/v1/chat/completions", json={})
            assert answer.status_code == 503
            assert "retry-after" in answer.headers
        assert server.process.wait(timeout=30) == 0


KILLED_CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
while True:
    for event in client.chat.completions.create(
        model="tita", messages=[{"role": "user", "content": "what ?"}], temperature=2,
        stream=True, n=4,
    ):
        print("event", flush=True)
"""


@pytest.mark.slow
def test_killed_clients_leave_no_request_behind(server: Server):
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED_CLIENT, f"{server.url}/v1"],
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for each in clients:
            assert each.stdout is not None
            assert each.stdout.readline() == "event\n"
        clients[0].kill()
        # The one that is left goes on.
        assert clients[1].stdout is not None
        for _ in range(200):
            assert clients[1].stdout.readline() == "event\n"
    finally:
        for each in clients:
            each.kill()
            each.wait()
            assert each.stdout is not None
            each.stdout.close()
    assert server.idle_within(5)
    answer = server.client().chat.completions.create(
        model="tita", messages=[{"role": "user", "content": "what ?"}]
    )
    assert answer.choices[0].finish_reason
