"""Load test of a server: throughput of concurrent streams, fairness, and overhead.

Both sides of each ratio are measured alternately in one run. The models are the demo's with a
longer context. Takes about a minute. Run: python benchmarks/serve_load.py
"""

import base64
import http.client
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from shared.verdicts import finish, verdict

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tita.align import Engine, EngineOptions, Guidance, Request, Sampling, TokenOutput
from tita.demo.models import Role, copy_with_context
from tita.vlm.loading import Models, load_vlm

STREAMS, BEHIND, TOKENS = 16, 8, 48
ROUNDS = 5
FASTER, WAITS, MS_A_TOKEN, MS_A_REQUEST = 4, 3, 1, 15
WAITS_FOR_PHOTOGRAPHS = 5
"""Decoding one takes one of two cores, and the clients run on the other."""
PHOTOGRAPH, LARGE_PHOTOGRAPH = (1024, 768), (4000, 3000)
HALF_OPEN, HALF_OPEN_COST, HALF_OPEN_MIB = 1000, 0.1, 20
HALF_OPEN_TOKENS = 400
QUESTION = "describe the picture"
WORDS = {"type": "text", "text": QUESTION}


@dataclass(frozen=True)
class Response:
    """Times of one response at its client."""

    first_token_s: float
    total_s: float
    num_tokens: int


@dataclass(frozen=True)
class Client:
    """Sends requests with http.client, because the client's own CPU time would be measured too."""

    port: int
    pid: int

    def ask(
        self,
        question: str,
        *,
        seed: int = 0,
        num_tokens: int = TOKENS,
        on_first_token: Callable[[], None] | None = None,
    ) -> Response:
        """Stream one response, and call `on_first_token` when its first token arrives."""
        body = request_body(question, seed=seed, num_tokens=num_tokens)
        return self.send(body, on_first_token=on_first_token)

    def send(self, body: bytes, *, on_first_token: Callable[[], None] | None = None) -> Response:
        """As `ask`, with a request's body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        start, first, usage = time.perf_counter(), 0.0, {}
        connection.request(
            "POST", "/v1/chat/completions", body, {"content-type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if not first and b'"role"' not in line and line != b"\n":
                first = time.perf_counter()
                if on_first_token is not None:
                    on_first_token()
            if b'"completion_tokens"' in line:
                usage = json.loads(line[6:])["usage"]
        end = time.perf_counter()
        connection.close()
        return Response(first - start, end - start, usage["completion_tokens"])


def request_body(
    question: "str | list[dict[str, Any]]", *, seed: int = 0, num_tokens: int = TOKENS
) -> bytes:
    # A seed and no end-of-text: both sides generate the same number of tokens.
    body = {
        "model": "tita", "messages": [{"role": "user", "content": question}],
        "temperature": 2, "ignore_eos": True, "seed": seed, "max_tokens": num_tokens,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body).encode()


@contextmanager
def models() -> Iterator[dict[Role, Path]]:
    """The demo's base and reward model with a longer context."""
    with tempfile.TemporaryDirectory(prefix="tita-load-") as scratch:
        yield copy_with_context(Path(scratch))


@contextmanager
def start_server(
    found: Mapping[Role, Path],
    arguments: Sequence[str],
    *,
    command: Sequence[str] = (sys.executable, "-m", "tita"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Client]:
    """A client of a ready server process; `command` is that of tita, in an environment."""
    named = [f"--{role}={path}" for role, path in found.items()]
    whole = [*command, "serve", "--port=0", *named, *arguments]
    process = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            if address := re.search(r"listening on \S+:(\d+)", line):
                port = int(address[1])
            if line.rstrip().endswith("ready"):
                break
        assert port, "the server did not start"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Client(port, process.pid)
    finally:
        process.terminate()
        process.wait()


def throughput(client: Client, *, at_once: int, num_tokens: int = TOKENS) -> float:
    """Tokens per second of STREAMS responses, `at_once` at a time."""

    def ask(seed: int) -> Response:
        return client.ask(QUESTION, seed=seed, num_tokens=num_tokens)

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        responses = list(pool.map(ask, range(STREAMS)))
    return sum(each.num_tokens for each in responses) / (time.perf_counter() - began)


@contextmanager
def half_open_connections(client: Client) -> Iterator[Callable[[], int]]:
    """HALF_OPEN connections that never send all of their headers.

    Those that the server closes are opened again, once a second. Yields a function that returns
    how many the server has accepted and not closed.
    """
    started, over = threading.Event(), threading.Event()
    connections: list[socket.socket] = []

    def connect() -> socket.socket:
        found = socket.create_connection(("127.0.0.1", client.port))
        found.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx-slow: ")
        found.setblocking(False)
        return found

    def is_open(connection: socket.socket) -> bool:
        try:
            return connection.recv(1) != b""
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    def hold() -> None:
        connections.extend(connect() for _ in range(HALF_OPEN))
        started.set()
        while not over.wait(1.0):
            for index, connection in enumerate(connections):
                if not is_open(connection):
                    connection.close()
                    connections[index] = connect()

    thread = threading.Thread(target=hold, daemon=True)

    def close() -> None:
        for connection in connections:
            connection.close()

    with ExitStack() as stack:
        stack.callback(close)
        stack.callback(thread.join)
        stack.callback(over.set)
        thread.start()
        started.wait()
        yield lambda: sum(map(is_open, connections))


def resident_mib(client: Client) -> float:
    """Resident memory of the server process."""
    text = Path(f"/proc/{client.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


def processor_s(client: Client) -> float:
    """Processor time of the server process so far."""
    fields = Path(f"/proc/{client.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def half_open_cost(client: Client) -> tuple[float, float]:
    """What half-open connections cost STREAMS running streams.

    Returns:
        The server's processor time with them over that without them, minus 1; their memory in MiB.
    """

    def stream() -> tuple[float, float]:
        began, used_s = time.perf_counter(), processor_s(client)
        throughput(client, at_once=STREAMS, num_tokens=HALF_OPEN_TOKENS)
        return processor_s(client) - used_s, time.perf_counter() - began

    stream()
    costs, waits, memory = [], [], []
    for _ in range(ROUNDS):
        alone = stream()
        before = resident_mib(client)
        with half_open_connections(client) as num_open:
            beside = stream()
            memory.append(resident_mib(client) - before)
            assert num_open() > 0.9 * HALF_OPEN, f"only {num_open()} are open"
        costs.append(beside[0] / alone[0] - 1)
        waits.append(beside[1] / alone[1] - 1)
    for what, found in (("processor time", costs), ("wall time", waits)):
        print(f"{what} of half-open connections: {', '.join(f'{each:+.1%}' for each in found)}")
    print(f"memory of half-open connections, MiB: {', '.join(f'{each:.1f}' for each in memory)}")
    return statistics.median(costs), max(memory)


def first_token_s(
    client: Client, *, behind: Callable[[threading.Semaphore], Response] | None
) -> float:
    """Seconds to the first token of a short request, on an idle server or behind BEHIND others."""
    if behind is None:
        return client.ask("what", num_tokens=2).first_token_s
    under_way = threading.Semaphore(0)
    with ThreadPoolExecutor(BEHIND) as pool:
        others = [pool.submit(behind, under_way) for _ in range(BEHIND)]
        for _ in others:
            under_way.acquire()
        found = client.ask("what", num_tokens=2).first_token_s
        assert not any(each.done() for each in others), "a long request ended too early"
        return found


def long_answer(client: Client) -> Callable[[threading.Semaphore], Response]:
    """Requests that generate long answers before the short request arrives."""
    return lambda under_way: client.ask(QUESTION, num_tokens=400, on_first_token=under_way.release)


def long_prompt(client: Client) -> Callable[[threading.Semaphore], Response]:
    """Requests whose prompts of 1,500 tokens are not prefilled when the short request arrives."""
    body = request_body(" ".join(["what"] * 1500), num_tokens=16)
    return lambda under_way: _send_before(client, body, under_way)


def photograph(
    client: Client, *, size: tuple[int, int]
) -> Callable[[threading.Semaphore], Response]:
    """Requests with different photographs that are not decoded when the short request arrives."""

    def body(seed: int) -> bytes:
        url = _photograph(seed, size=size)
        return request_body(
            [{"type": "image_url", "image_url": {"url": url}}, WORDS], num_tokens=16
        )

    # Made before, because a client that makes them would take the server's time.
    bodies = deque(body(seed) for seed in range(BEHIND * ROUNDS))
    return lambda under_way: _send_before(client, bodies.popleft(), under_way)


def _send_before(client: Client, body: bytes, under_way: threading.Semaphore) -> Response:
    threading.Timer(0.02, under_way.release).start()
    return client.send(body)


def _photograph(seed: int, *, size: tuple[int, int]) -> str:
    """A JPEG with about as many bytes per pixel as a photograph, 340 kB for 1024 x 768."""
    few = (size[1] // 8, size[0] // 8, 3)
    spots = np.random.default_rng(seed).integers(256, size=few, dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(spots).resize(size).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class LocalEngine:
    """The same answers from the engine in this process, without HTTP and other threads."""

    def __init__(self, found: dict[Role, Path]) -> None:
        models = Models(*(load_vlm(str(found[role])) for role in ("base", "reward")))
        self._engine = Engine(models, EngineOptions(pack=False))
        self._batch = self._engine.new_batch()

    def ask(self, *, seed: int, num_tokens: int) -> Response:
        sampling = Sampling(max_new_tokens=num_tokens, temperature=2, seed=seed, ignore_end=True)
        request = Request(question=QUESTION, guidance=Guidance(weight=0.3), sampling=sampling)
        start, first, count = time.perf_counter(), 0.0, 0
        self._batch.admit(seed, self._engine.preparer.prepare(request))
        while len(self._batch):
            outputs = [output for _, output in self._batch.step()]
            first = first or (time.perf_counter() if outputs else 0.0)
            count += sum(each.counted for each in outputs if isinstance(each, TokenOutput))
        return Response(first - start, time.perf_counter() - start, count)


def overhead_s(client: Client, engine: LocalEngine, *, num_tokens: int) -> float:
    """Median difference between the time of the server and that of the engine."""
    differences = []
    for seed in range(3 * ROUNDS):
        local = engine.ask(seed=seed, num_tokens=num_tokens)
        served = client.ask(QUESTION, seed=seed, num_tokens=num_tokens)
        assert served.num_tokens == local.num_tokens == num_tokens
        differences.append(served.total_s - local.total_s)
    return statistics.median(differences)


def measure(client: Client, engine: LocalEngine) -> None:
    throughput(client, at_once=4)
    ratios = []
    for _ in range(ROUNDS):
        one, many = (throughput(client, at_once=number) for number in (1, STREAMS))
        ratios.append(many / one)
    print(f"tokens/s: {one:,.0f} one at a time, {many:,.0f} of {STREAMS} streams")
    verdict(f"tokens/s of {STREAMS} streams over one", statistics.median(ratios), at_least=FASTER)
    cases = (
        ("long answers", long_answer(client), WAITS),
        ("long prompts", long_prompt(client), WAITS),
        ("photographs", photograph(client, size=PHOTOGRAPH), WAITS_FOR_PHOTOGRAPHS),
        (
            "twelve-megapixel photographs",
            photograph(client, size=LARGE_PHOTOGRAPH),
            WAITS_FOR_PHOTOGRAPHS,
        ),
    )
    for what, behind, bound in cases:
        idle, busy = [], []
        for _ in range(ROUNDS):
            idle.append(first_token_s(client, behind=None))
            busy.append(first_token_s(client, behind=behind))
        alone_s, waited_s = statistics.median(idle), statistics.median(busy)
        print(f"first token: {1e3 * alone_s:.1f} ms idle, {1e3 * waited_s:.1f} ms behind {what}")
        ratio = waited_s / alone_s
        verdict(f"first token behind {BEHIND} {what} over idle", ratio, at_most=bound)
    short_s, long_s = (overhead_s(client, engine, num_tokens=number) for number in (1, TOKENS))
    verdict("overhead, ms a request", 1e3 * short_s, at_most=MS_A_REQUEST)
    verdict("overhead, ms a token", 1e3 * (long_s - short_s) / (TOKENS - 1), at_most=MS_A_TOKEN)
    cost, memory_mib = half_open_cost(client)
    what = f"{HALF_OPEN:,} half-open connections beside {STREAMS} streams"
    verdict(f"{what}, share of time", max(cost, 0.0), at_most=HALF_OPEN_COST)
    verdict(f"{what}, MiB", memory_mib, at_most=HALF_OPEN_MIB)


def main(arguments: Sequence[str]) -> None:
    with models() as found, start_server(found, arguments) as client:
        measure(client, LocalEngine(found))
    finish()


if __name__ == "__main__":
    main(sys.argv[1:])
