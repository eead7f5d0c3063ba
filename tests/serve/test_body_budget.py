"""The bodies of requests in progress are bounded together."""

import json
import socket
import time

from in_process import hosted

from tita.serve import ServeOptions
from tita.serve.model_loading import LoadedModels

PATH = "/v1/chat/completions"
KIB = 1024


def body(size: int) -> bytes:
    """A request of this size; blanks are no part of its prompt."""
    sent = {"model": "tita", "messages": [{"role": "user", "content": "what"}], "max_tokens": 2}
    return json.dumps(sent).encode().ljust(size)


def test_bodies_are_bounded_together(models: LoadedModels):
    headers = {"content-type": "application/json"}
    with hosted(models, ServeOptions(max_bodies_bytes=1000 * KIB)) as client:
        address = (client.base_url.host, client.base_url.port)

        def post(size: int) -> int:
            return client.post(PATH, content=body(size), headers=headers).status_code

        def chunked(size: int) -> int:
            return client.post(PATH, content=iter([body(size)]), headers=headers).status_code

        head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"

        def refused_by_its_length(size: int) -> bool:
            """Sends no body, which could make the server refuse the other request."""
            with socket.create_connection(address, timeout=0.3) as probe:
                probe.sendall(f"{head}content-length: {size}\r\n\r\n".encode())
                try:
                    return probe.recv(4096).startswith(b"HTTP/1.1 429")
                except TimeoutError:
                    return False

        assert post(900 * KIB) == 200
        with socket.create_connection(address) as slow:
            slow.sendall(f"{head}content-length: {800 * KIB}\r\n\r\n".encode())
            slow.sendall(body(800 * KIB)[: 700 * KIB])
            ends = time.monotonic() + 30
            while not refused_by_its_length(350 * KIB):
                assert time.monotonic() < ends, "what has arrived must count"
            assert chunked(350 * KIB) == 429
            refused = client.post(PATH, content=body(350 * KIB), headers=headers)
            assert refused.json()["error"]["code"] == "bodies_too_large"
            assert refused.headers["retry-after"] == "1"
            assert post(200 * KIB) == 200
            assert client.get("/healthz").status_code == 200
            slow.sendall(body(800 * KIB)[700 * KIB :])
            assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        # Answered, rejected and broken requests hold nothing.
        for _ in range(3):
            assert post(900 * KIB) == 200
            assert chunked(2000 * KIB) == 413
            client.post(PATH, content=b"{" * 900 * KIB, headers=headers)
        with socket.create_connection(address) as gone:
            gone.sendall(f"{head}content-length: {800 * KIB}\r\n\r\n".encode())
            gone.sendall(body(800 * KIB)[: 700 * KIB])
        ends = time.monotonic() + 30
        while post(900 * KIB) != 200:
            assert time.monotonic() < ends, "a client that has gone must not hold its share"


def test_a_body_that_never_fits_is_too_large(models: LoadedModels):
    """Status 429 would make a client try again for ever."""
    headers = {"content-type": "application/json"}
    with hosted(models, ServeOptions(max_bodies_bytes=1000 * KIB)) as client:
        for content in (body(1001 * KIB), iter([body(1001 * KIB)])):
            refused = client.post(PATH, content=content, headers=headers)
            assert refused.status_code == 413
            assert refused.json()["error"] == {
                "message": "the request body is larger than 1,024,000 bytes (--max-bodies-mib)",
                "type": "invalid_request_error",
                "param": None,
                "code": "body_too_large",
            }
            assert "retry-after" not in refused.headers


def test_a_stream_gives_its_share_back_when_it_starts(models: LoadedModels):
    headers = {"content-type": "application/json"}
    sent = json.loads(body(0)) | {"stream": True, "max_tokens": 60, "ignore_eos": True}
    with hosted(models, ServeOptions(max_bodies_bytes=1000 * KIB)) as client:
        large = json.dumps(sent).encode().ljust(900 * KIB)
        with client.stream("POST", PATH, content=large, headers=headers) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert client.post(PATH, content=body(900 * KIB), headers=headers).status_code == 200
            assert list(lines)[-2] == "data: [DONE]"
