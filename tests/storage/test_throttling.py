"""Pulls from an S3 server that answers 503 SlowDown above a rate, as AWS does for each prefix."""

import http.client
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from tita.errors import StoreUnavailable
from tita.settings import settings
from tita.storage import open_store, s3_client
from tita.storage.request_rate import RequestRate

RATE = 80.0
"""Requests per second that are answered."""
NUM_FILES = 80
NUM_REFUSED = 5
"""A busy machine may not send as many as are answered."""


class ThrottlingProxy(BaseHTTPRequestHandler):
    """Forwards `rate` requests per second and refuses the others, and the first `NUM_REFUSED`."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str] = ""
    rate: ClassVar[float] = RATE
    guard: ClassVar[threading.Lock] = threading.Lock()
    tokens: ClassVar[float] = 0.0
    filled_at: ClassVar[float] = 0.0
    num_answered: ClassVar[Counter[str]] = Counter()
    """By the name that a client gives in `AWS_SDK_UA_APP_ID`."""
    num_refused: ClassVar[int] = 0

    def do_GET(self) -> None:
        kind = ThrottlingProxy
        with kind.guard:
            now = time.monotonic()
            kind.tokens = min(kind.tokens + (now - kind.filled_at) * kind.rate, kind.rate / 10)
            kind.filled_at = now
            is_refused = kind.tokens < 1 or kind.num_refused < NUM_REFUSED
            if is_refused:
                kind.num_refused += 1
            else:
                kind.tokens -= 1
                name = self.headers["User-Agent"].rpartition("app/")[2].split()[0]
                kind.num_answered[name] += 1
        if is_refused:
            self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        link = http.client.HTTPConnection(self.upstream)
        link.request(self.command, self.path, headers=dict(self.headers.items()))
        got = link.getresponse()
        self.answer(got.status, dict(got.getheaders()), got.read())
        link.close()

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        try:
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client was killed

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def environment(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """An environment with a tree `data` of `NUM_FILES` files behind the proxy."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(NUM_FILES):
        (folder / f"{number:04}.bin").write_bytes(str(number).encode() * 100)
    open_store().push_tree(folder, "data")
    monkeypatch.setattr(
        ThrottlingProxy, "upstream", urlsplit(s3_environment["TITA_S3_ENDPOINT_URL"]).netloc
    )
    monkeypatch.setattr(ThrottlingProxy, "num_answered", Counter())
    monkeypatch.setattr(ThrottlingProxy, "num_refused", 0)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), ThrottlingProxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    monkeypatch.setenv("TITA_S3_ENDPOINT_URL", url)
    settings.cache_clear()
    yield {**os.environ, "TITA_S3_ENDPOINT_URL": url}
    proxy.shutdown()
    proxy.server_close()
    settings.cache_clear()


def start_pull(env: dict[str, str], cache: Path, *, name: str) -> "subprocess.Popen[str]":
    code = "from tita.storage import open_store; print(open_store().pull_tree('data'))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**env, "TITA_CACHE_DIR": str(cache), "AWS_SDK_UA_APP_ID": name},
        stdout=subprocess.PIPE,
        text=True,
    )


def check(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    found = {path.name: path.read_bytes() for path in Path(output.strip()).iterdir()}
    assert found == {f"{n:04}.bin": str(n).encode() * 100 for n in range(NUM_FILES)}


@pytest.mark.slow
def test_pods_with_empty_and_with_half_filled_caches_finish_at_a_throttled_rate(
    environment: dict[str, str], tmp_path: Path
) -> None:
    # A pod that is killed half-way, and a second pod that begins with an empty cache.
    killed, other = (start_pull(environment, tmp_path / name, name=name) for name in ("one", "two"))
    objects = tmp_path / "one" / "objects"
    while len(list(objects.glob("*/*"))) < NUM_FILES // 4:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    # Files that are being written have names that begin with a dot.
    num_cached = len(list(objects.glob("*/[!.]*")))
    # It ends and is replaced on the same node.
    check(other)
    check(start_pull(environment, tmp_path / "one", name="again"))
    assert ThrottlingProxy.num_answered["again"] == NUM_FILES + 1 - num_cached
    assert ThrottlingProxy.num_answered["two"] == NUM_FILES + 1


def test_throttling_that_never_ends_is_reported_and_ends(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ThrottlingProxy, "rate", 0.0)
    monkeypatch.setattr(s3_client, "_THROTTLE_PATIENCE_S", 3.0)
    monkeypatch.setattr(s3_client, "_MAX_ATTEMPTS", 2)
    monkeypatch.setattr(s3_client.retry, "before_sleep", s3_client.RetryLog())
    caplog.set_level(logging.INFO, logger="tita")
    monkeypatch.setattr(s3_client, "_rate", RequestRate())
    with pytest.raises(StoreUnavailable, match="the server responds SlowDown"):
        open_store().get("data/manifest.json")
    assert ThrottlingProxy.num_refused > 4
    # Once a minute.
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("the server responds SlowDown; slowing down, 0 requests/s succeed")


def test_rate_follows_what_the_server_answers() -> None:
    """Two simulated processes of 16 threads at a server that answers 50 requests per second."""
    dice, now, num_answered, num_refused, tokens = random.Random(0), 0.0, [0, 0], 0, 5.0
    rates = [RequestRate(clock=lambda: now) for _ in num_answered]
    ready_at = {(process, thread): dice.random() for process in (0, 1) for thread in range(16)}
    while now < 60.0:
        now += 0.005
        tokens = min(tokens + 0.005 * 50, 5.0)
        due = [thread for thread, at in ready_at.items() if at <= now]
        for thread in dice.sample(due, len(due)):
            rate, pause_s = rates[thread[0]], 0.02
            if tokens >= 1:
                tokens -= 1
                num_answered[thread[0]] += 1
                rate.succeeded()
            else:
                num_refused += 1
                rate.refused()
                pause_s = dice.uniform(0.05, 0.5)
            ready_at[thread] = now + pause_s + rate.reserve()
    assert sum(num_answered) > 0.85 * 60 * 50
    assert num_refused < 0.2 * sum(num_answered)
    assert min(num_answered) > 0.7 * max(num_answered)
    # Single refusals do not slow a process down.
    alone = RequestRate(clock=lambda: now)
    for number in range(2_000):
        now += 0.003
        alone.refused() if number % 20 == 0 else alone.succeeded()
        assert alone.reserve() == 0
