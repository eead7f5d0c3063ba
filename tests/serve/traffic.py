"""Requests of all kinds, and the expected result of each."""

import base64
import http.client
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve_process import Server, about, picture

COLOURS = ("red", "blue", "green", "yellow", "black", "purple")
"""A few images only, so that the prefix cache soon stops growing."""
CHAT = "/v1/chat/completions"


def body(number: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": ("what", "is there a 7 ?")[number % 2]}]
    given = {"model": "tita", "messages": messages, "max_tokens": 6, "seed": number}
    return given | {"temperature": number % 3} | changes


def _complete(server: Server, number: int) -> None:
    status, answer = ask(server, body(number))
    assert status == 200, answer
    assert json.loads(answer)["choices"][0]["finish_reason"]


def _streamed(server: Server, number: int) -> None:
    status, answer = ask(server, body(number, stream=True, n=1 + number % 2))
    assert status == 200
    assert answer.endswith(b"data: [DONE]\n\n"), answer


def _image(server: Server, number: int) -> None:
    seen = about(picture(COLOURS[number % len(COLOURS)]), "what color ?")
    status, answer = ask(server, body(number, messages=seen, stream=bool(number % 2)))
    assert status == 200, answer


def _worker(server: Server, number: int) -> None:
    image = base64.b64encode(picture(COLOURS[number % len(COLOURS)])).decode()
    body = {"model": "tita", "prompt": "user: <image> what assistant:", "images": [image]}
    status, answer = ask(server, body | {"max_new_tokens": 4}, path="/worker_generate_stream")
    assert status == 200
    assert json.loads(answer.split(b"\0")[-2])["error_code"] == 0, answer


def _rejected(server: Server, number: int) -> None:
    bad: list[Any] = [
        body(number, model="nobody"), body(number, temperature="hot"), body(number, n=10**6),
        body(number, messages=about(b"no image", "what")), body(number, max_tokens=-1), [], 7,
        body(number, messages=about(picture()[:60], "what")), b'{"model": "tita', b"\xff\xfe",
        body(number, messages=[{"role": "user", "content": "what " * 5000}]),
    ]  # fmt: skip
    status, answer = ask(server, bad[number % len(bad)])
    assert 400 <= status < 500, (status, answer)
    assert json.loads(answer)["error"]["message"]


def _disconnected_midway(server: Server, number: int) -> None:
    connection = start(server, body(number, stream=True, max_tokens=40, ignore_eos=True))
    connection.getresponse().read1(10)
    connection.close()


def _disconnected_at_once(server: Server, number: int) -> None:
    seen = about(picture(COLOURS[number % len(COLOURS)]), "what")
    start(server, body(number, messages=seen, max_tokens=40)).close()


KINDS = {
    _complete: 30, _streamed: 20, _image: 15, _worker: 5, _rejected: 15, _disconnected_midway: 10,
    _disconnected_at_once: 5,
}  # fmt: skip


def send(server: Server, *, num_requests: int, seed: int, at_once: int = 8) -> None:
    """Send a seeded mix of requests, and check the result of each."""
    chance = random.Random(seed)
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=num_requests)
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(lambda n: kinds[n](server, n), range(num_requests)):
            pass


def ask(server: Server, content: Any, *, path: str = CHAT) -> tuple[int, bytes]:
    """Status and body of the response."""
    connection = start(server, content, path)
    try:
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def start(server: Server, content: Any, path: str = CHAT) -> http.client.HTTPConnection:
    """Send a request, and do not wait for the response."""
    sent = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    connection.request("POST", path, sent, {"content-type": "application/json"})
    return connection
