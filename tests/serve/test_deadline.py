"""Requests that exceed the deadline: the error, and that their place is free again."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import traffic
from serve_process import Server, serving

from tita.demo.models import copy_with_context

ENDLESS = {"max_tokens": 4000, "ignore_eos": True, "temperature": 2}
LATE = 'tita:request_total{model_name="tita",outcome="deadline"}'
MESSAGE = "the request did not finish within 1 s"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for one request at a time, with a deadline of one second."""
    models = copy_with_context(tmp_path_factory.mktemp("long"))
    with serving("--max-batch", "1", "--deadline-s", "1", models=models) as server:
        yield server.ready()


def test_a_late_stream_ends_with_an_error_event(impatient: Server):
    late = impatient.metric(LATE)
    body = traffic.body(1, **ENDLESS, stream=True, stream_options={"include_usage": True})
    with httpx.stream("POST", impatient.url + traffic.CHAT, json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    *chunks, last = map(json.loads, lines)
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks), "it did not finish"
    assert last == {
        "error": {
            "message": MESSAGE, "type": "server_error", "param": None, "code": "deadline_exceeded",
        }
    }  # fmt: skip
    assert impatient.metric(LATE) == late + 1
    # The only place is free again.
    assert traffic.ask(impatient, traffic.body(2, max_tokens=1))[0] == 200
    assert impatient.idle_within(60)


def test_openais_client_raises_during_the_stream(impatient: Server):
    stream = impatient.client().chat.completions.create(
        model="tita", messages=[{"role": "user", "content": "what"}], stream=True,
        max_tokens=4000, temperature=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    with pytest.raises(openai.APIError, match=MESSAGE) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "deadline_exceeded"


@pytest.mark.parametrize(
    "begun", ["content-length: 500\r\n\r\n{", "transfer-encoding: chunked\r\n\r\n"]
)
def test_an_incomplete_body_times_out(impatient: Server, begun: str):
    host, port = impatient.url.removeprefix("http://").split(":")
    head = f"POST {traffic.CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall((head + begun).encode())
        answer = b"".join(iter(lambda: slow.recv(65536), b""))  # until it is closed
    status, _, body = answer.partition(b"\r\n")
    assert b" 408 " in status
    error = json.loads(body.rpartition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "body_too_slow"
    assert "Traceback" not in impatient.log


def test_the_deadline_applies_to_waiting_and_running_requests(impatient: Server):
    late = impatient.metric(LATE)
    with ThreadPoolExecutor(2) as pool:
        answers = list(
            pool.map(lambda n: traffic.ask(impatient, traffic.body(n, **ENDLESS)), (1, 2))
        )
    for status, answer in answers:
        assert status == 504
        assert json.loads(answer)["error"]["code"] == "deadline_exceeded"
    assert impatient.metric(LATE) == late + 2
    assert impatient.idle_within(60)
    assert "Traceback" not in impatient.log
