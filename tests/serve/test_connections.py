"""Half-open connections end by themselves, and keep nobody from being served."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest
from serve_process import Server, serving

from tita.serve.connections import RepeatFilter

HALF = b"GET /health HTTP/1.1\r\nhost: a\r\nx-slow: "
# A probe that waits for a place would wait 10 s or longer, which `--header-timeout-s` is.
PROBE_S = 9
BODY = {"model": "tita", "messages": [{"role": "user", "content": "describe"}], "seed": 1}


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def closed(connection: socket.socket) -> bool:
    """Whether the server closes the connection; waits up to its timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the server closes a connection that goes on sending headers, a byte now and then."""
    try:
        for _ in range(200):
            time.sleep(0.1)
            connection.sendall(b"x")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


@contextmanager
def half_open(server: Server, number: int) -> Iterator[list[socket.socket]]:
    """Connections that never send all of their headers."""
    with ExitStack() as stack:
        found = [stack.enter_context(connect(server)) for _ in range(number)]
        for connection in found:
            connection.sendall(HALF)
        yield found


@pytest.fixture(scope="module")
def hurried() -> Iterator[Server]:
    with serving("--header-timeout-s", "1") as server:
        yield server.ready()


def test_headers_must_come_in_time(hurried: Server):
    with (
        half_open(hurried, 20) as connections,
        connect(hurried) as silent,
        connect(hurried) as slow,
    ):
        slow.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        # The second request of a connection has the same time; a byte now and then is not enough.
        slow.sendall(HALF)
        assert is_cut_off(slow)
        assert closed(silent)
        assert all(map(closed, connections))


def test_requests_in_time_are_not_cut_off(hurried: Server):
    """Idle time between requests, slow bodies, and long answers are no slow headers."""
    with httpx.Client(base_url=hurried.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        time.sleep(1.5)
        assert client.get("/health").status_code == 200

        def slowly() -> Iterator[bytes]:
            yield b'{"model": "tita", "max_tokens": 2, '
            time.sleep(1.5)
            yield b'"messages": [{"role": "user", "content": "what"}]}'

        headers = {"content-type": "application/json"}
        found = client.post("/v1/chat/completions", content=slowly(), headers=headers)
        assert found.status_code == 200, found.text


def test_half_open_connections_make_room():
    """With few open files all requests are answered, and little is logged."""
    with serving(prefix=("prlimit", "--nofile=128:128")) as server:
        server.ready()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=60
        ) as stream, half_open(server, 250):  # fmt: skip
            for _ in range(5):
                assert httpx.get(f"{server.url}/health", timeout=PROBE_S).status_code == 200
            again = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
            assert again.json()["choices"] == answer.json()["choices"]
            with half_open(server, 250):
                assert httpx.get(f"{server.url}/health", timeout=PROBE_S).status_code == 200
            assert stream.read().endswith(b"data: [DONE]\n\n")
        assert "Traceback" not in server.log
        assert len(server.log) < 20_000
        assert "connections; one without a complete request is closed" in server.log


def test_probes_are_answered_whatever_clients_hold_open():
    """Bodies that never arrive, streams that nobody reads, and requests that wait."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    endless = BODY | {"max_tokens": 2000, "ignore_eos": True}
    stream = json.dumps(endless | {"stream": True}).encode()
    unary = json.dumps(endless).encode()
    held = {
        "bodies that never arrive": head + b"content-length: 1000\r\n\r\n{",
        "streams that nobody reads": head + b"content-length: %d\r\n\r\n" % len(stream) + stream,
        "requests that wait": head + b"content-length: %d\r\n\r\n" % len(unary) + unary,
    }
    with serving("--grace-s", "0", prefix=("prlimit", "--nofile=128:128")) as server:
        server.ready()
        assert "so 16 requests wait at most, not 64; raise it with `ulimit -n`" in server.log
        for what, sent in held.items():
            with ExitStack() as stack:
                for _ in range(150):
                    connection = stack.enter_context(connect(server))
                    with suppress(OSError):
                        connection.sendall(sent)
                for _ in range(5):
                    probed = httpx.get(f"{server.url}/health", timeout=PROBE_S)
                    assert probed.status_code == 200, what
                # Refused for now, or served: what it never may is to be cut off.
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
                assert answer.status_code in ((200,) if "bodies" in what else (200, 429)), what
        assert "Traceback" not in server.log


def test_what_is_no_http_is_logged_a_few_times_only(hurried: Server):
    for _ in range(50):
        with connect(hurried) as connection:
            connection.sendall(b"\x16\x03\x01 no http\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert 1 <= hurried.log.count("Invalid HTTP request") <= 5


def test_messages_that_were_left_out_are_counted(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("tita.serve.connections.time", clock)
    logger, lines = logging.getLogger("tests.repeated"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    repeats = RepeatFilter(num_repeats=2)
    logger.addFilter(repeats)
    for number in range(5):
        logger.warning("no file for %d", number)
    logger.warning("another")
    assert lines == ["no file for 0", "no file for 1", "another"]
    now += 61
    logger.warning("no file for %d", 9)
    assert lines[3:] == ["no file for 9 (3 more in the minute before)"]
