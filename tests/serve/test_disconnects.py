"""Clients that disconnect and servers that stop: places are freed, answers are not lost."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import traffic
from serve_process import Server, serving

from tita.demo.models import ROLES, Role, copy_with_context, demo_model_path

LONG = {"max_tokens": 3500, "ignore_eos": True, "temperature": 2, "stream": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Role, Path]:
    return copy_with_context(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def narrow(models: dict[Role, Path]) -> Iterator[Server]:
    """A server for one request at a time, whose answers take many seconds."""
    with serving("--max-batch", "1", models=models) as server:
        yield server.ready()


def test_disconnecting_cancels_a_running_request(narrow: Server):
    written, aborted = narrow.metric("tita:generation_tokens_total"), outcomes(narrow)["abort"]
    with httpx.stream("POST", narrow.url + traffic.CHAT, json=traffic.body(1, **LONG)) as first:
        assert first.status_code == 200
        wait_for_metric(narrow, "tita:num_requests_running", 1)
    # Otherwise this request would wait for thousands of tokens.
    status, answer = traffic.ask(narrow, traffic.body(2))
    assert status == 200, answer
    assert narrow.metric("tita:generation_tokens_total") - written < 1500
    assert narrow.idle_within(60)
    assert outcomes(narrow)["abort"] == aborted + 1


def test_disconnecting_cancels_a_waiting_request(narrow: Server):
    ended = num_ended(narrow)
    with httpx.stream("POST", narrow.url + traffic.CHAT, json=traffic.body(1, **LONG)) as first:
        assert first.status_code == 200
        wait_for_metric(narrow, "tita:num_requests_running", 1)
        for stream in (True, False):
            waiting = traffic.start(narrow, traffic.body(2, stream=stream))
            wait_for_metric(narrow, "tita:num_requests_waiting", 1)
            waiting.close()
            wait_for_metric(narrow, "tita:num_requests_waiting", 0)
        assert narrow.metric("tita:num_requests_running") == 1, "the first must continue"
    assert narrow.idle_within(60)
    assert num_ended(narrow) == ended


LONG_WORDS = [{"role": "user", "content": "what " * 1500}]
"""Two of these requests are prepared; a third one waits for a slot."""


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_cancels_a_request_that_is_not_prepared(narrow: Server, stream: bool):
    ended = num_ended(narrow)
    with httpx.stream("POST", narrow.url + traffic.CHAT, json=traffic.body(1, **LONG)) as first:
        assert first.status_code == 200
        wait_for_metric(narrow, "tita:num_requests_running", 1)
        waiting = []
        for number in range(1, 6):
            body = traffic.body(2, messages=LONG_WORDS, stream=stream)
            waiting.append(traffic.start(narrow, body))
            wait_for_metric(narrow, "tita:num_requests_waiting", number)
        for connection in waiting[3:]:
            connection.close()
        wait_for_metric(narrow, "tita:num_requests_waiting", 3)
        assert narrow.metric("tita:num_requests_running") == 1, "the first must continue"
        for connection in waiting[:3]:
            connection.close()
    assert narrow.idle_within(60)
    assert num_ended(narrow) == ended


CLIENT = f"""
import http.client, json, sys
for number in range(int(sys.argv[2])):
    connection = http.client.HTTPConnection(sys.argv[1], timeout=60)
    body = {{"model": "tita", "messages": [{{"role": "user", "content": "what"}}], "n": 2,
            "max_tokens": 40, "ignore_eos": True, "seed": number, "stream": True}}
    connection.request("POST", "{traffic.CHAT}", json.dumps(body),
                       {{"content-type": "application/json"}})
    response = connection.getresponse()
    print("started", flush=True)
    assert response.read().endswith(b"data: [DONE]\\n\\n")
    print("complete", flush=True)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_clients_do_not_affect_others(server: Server, seed: int):
    chance, num_answers = random.Random(seed), 5
    address = server.url.removeprefix("http://")
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, address, str(num_answers)],
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    killed = chance.sample(range(6), 3)
    for number in killed:
        stdout = clients[number].stdout
        assert stdout is not None
        # Kill the client during one of its answers.
        for _ in range(2 * chance.randrange(num_answers) + 1):
            stdout.readline()
        time.sleep(chance.random() / 20)
        clients[number].send_signal(signal.SIGKILL)
    for number, client in enumerate(clients):
        output, _ = client.communicate(timeout=60)
        if number not in killed:
            assert client.returncode == 0
            assert output == "started\ncomplete\n" * num_answers
    assert server.idle_within(60)
    assert traffic.ask(server, traffic.body(1))[0] == 200


def test_sigterm_under_load_loses_no_answer(models: dict[Role, Path]):
    with serving("--grace-s", "60", models=models) as server:
        server.ready()
        answers: list[tuple[int, bytes]] = []

        def keep_asking(first: int) -> None:
            for number in range(first, 10**6):
                request = traffic.body(number, stream=number % 3 > 0, max_tokens=40)
                answers.append(traffic.ask(server, request))
                if answers[-1][0] == 503:
                    break

        long = traffic.body(9, **LONG | {"max_tokens": 400})
        with ThreadPoolExecutor(8) as pool, httpx.Client(timeout=60) as kept:
            longest = pool.submit(traffic.ask, server, long)
            others = [pool.submit(keep_asking, number) for number in range(7)]
            while len(answers) < 10:
                time.sleep(0.01)
            assert kept.get(f"{server.url}/readyz").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            for each in others:
                each.result(60)
            # The long request is still running, so the server still responds.
            refused = kept.get(f"{server.url}/readyz")
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            answers.append(longest.result())
        assert server.process.wait(timeout=60) == 0
        assert {status for status, _ in answers} == {200, 503}
        for status, answer in answers:
            if status == 503:
                assert json.loads(answer)["error"]["code"] == "shutting_down"
            else:
                assert b'"finish_reason": "' in answer or b'"finish_reason":"' in answer
                assert answer.endswith((b"data: [DONE]\n\n", b"}"))
        assert "Traceback" not in server.log


def test_a_request_longer_than_the_grace_period_fails(models: dict[Role, Path]):
    with serving("--grace-s", "0.5", models=models) as server:
        server.ready()
        body = traffic.body(1, **LONG)
        with httpx.stream("POST", server.url + traffic.CHAT, json=body, timeout=60) as response:
            events = response.iter_lines()
            assert next(events)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in events if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.process.wait(timeout=60) == 0


def test_a_second_sigterm_aborts_running_requests(models: dict[Role, Path]):
    with serving("--grace-s", "3600", models=models) as server, ThreadPoolExecutor(1) as pool:
        server.ready()
        whole = pool.submit(traffic.ask, server, traffic.body(2, **LONG | {"stream": False}))
        wait_for_metric(server, "tita:num_requests_running", 1)
        body = traffic.body(1, **LONG)
        with httpx.stream("POST", server.url + traffic.CHAT, json=body, timeout=60) as response:
            # A reference, since the stream is closed when the iterator is deleted.
            lines = response.iter_lines()
            assert next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("(SIGTERM received), ")
            assert [next(lines) for _ in range(10)], "the first signal lets it run"
            server.process.send_signal(signal.SIGTERM)
            # Long before their answers would be complete.
            assert server.process.wait(timeout=10) == 0
            assert "shutting_down" in [*filter(None, lines)][-1]
        status, answer = whole.result(10)
        assert (status, json.loads(answer)["error"]["code"]) == (503, "shutting_down")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_stops_the_server(number: signal.Signals):
    server = Server(*(f"--{role}={demo_model_path(role)}" for role in ROLES))
    try:
        server.process.send_signal(number)
        assert server.process.wait(timeout=60) == 0
        assert "Traceback" not in server.log
    finally:
        server.close()


def test_a_client_that_stops_reading_is_disconnected():
    with serving("--deadline-s", "10") as server:
        server.ready()
        with stop_reading(server) as stalled:
            assert is_connected(server, stalled)
            # Its answer is generated, and others are answered meanwhile.
            for number in range(5):
                assert traffic.ask(server, traffic.body(number))[0] == 200
            assert server.idle_within(60)
            ends = time.monotonic() + 60
            while is_connected(server, stalled) and time.monotonic() < ends:
                time.sleep(0.1)
            assert not is_connected(server, stalled), "the server must close it"
        assert "Traceback" not in server.log


def stop_reading(server: Server) -> socket.socket:
    """Request more than fits into the socket buffers, and read nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    request = traffic.body(
        1, stream=True, n=16, logprobs=True, top_logprobs=20, max_tokens=50, ignore_eos=True
    )
    content = json.dumps(request).encode()
    head = f"POST {traffic.CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return client


def is_connected(server: Server, client: socket.socket) -> bool:
    """Whether the server's end of a connection exists (proc(5), `/proc/net/tcp`)."""
    ports = int(server.url.rpartition(":")[2]), client.getsockname()[1]
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    pairs = [[int(end.partition(":")[2], 16) for end in line.split()[1:3]] for line in lines]
    return list(ports) in pairs


def outcomes(server: Server) -> "defaultdict[str, float]":
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("tita:request_total{")]
    counts = {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in found}
    return defaultdict(float, counts)


def num_ended(server: Server) -> float:
    """Number of requests whose answers were complete."""
    return sum(count for outcome, count in outcomes(server).items() if outcome != "abort")


def wait_for_metric(server: Server, name: str, value: float) -> None:
    ends = time.monotonic() + 60
    while server.metric(name) != value:
        assert time.monotonic() < ends, f"{name} stays {server.metric(name)}"
        time.sleep(0.01)
