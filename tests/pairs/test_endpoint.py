"""The client of judges and teachers, against responses that OpenAI's own API never sends."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tita.errors import ExitCode, TitaError
from tita.pairs.endpoint import (
    Completion,
    Endpoint,
    EndpointUnavailable,
    Failure,
    ModelChanged,
)
from tita.recipes import EndpointRecipe

Response = tuple[int, str, bytes]


def chat(**choice: Any) -> Response:
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", **choice}
    return 200, "application/json", json.dumps(body).encode()


GOOD = chat(
    choices=[
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}
    ],
    usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
)
TOO_LARGE = (413, "text/plain", b"the image is too large")


@pytest.fixture
def digests() -> list[str]:
    """The header of the next responses, at most one."""
    return []


@pytest.fixture
def endpoint(
    monkeypatch: pytest.MonkeyPatch, digests: list[str]
) -> Iterator[Callable[[Response], Endpoint]]:
    """An endpoint whose next responses are given. A proxy cannot reach it."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    responses: list[Response] = []
    headers = digests

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, kind, body = responses[-1]
            self.send_response(status)
            self.send_header("content-type", kind)
            for header in headers:
                self.send_header("x-tita-model-digest", header)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    client = Endpoint(EndpointRecipe(base_url=url, model="m", retries=0), where="endpoint")

    def answering(response: Response) -> Endpoint:
        responses.append(response)
        return client

    yield answering
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (GOOD, Completion(text="a", prompt_tokens=7, completion_tokens=2, model="m")),
        (chat(choices=[]), Completion(text="", prompt_tokens=0, completion_tokens=0, model="m")),
        (
            chat(choices=[{"message": {"content": None}}], usage={"prompt_tokens": None}),
            Completion(text="", prompt_tokens=0, completion_tokens=0, model="m"),
        ),
        (
            chat(
                choices=[
                    {
                        "message": {
                            "content": [
                                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                                {"type": "text", "text": "a"},
                            ]
                        }
                    }
                ]
            ),
            Completion(text="a", prompt_tokens=0, completion_tokens=0, model="m"),
        ),
        (
            chat(choices=[], model=None, system_fingerprint=7),
            Completion(text="", prompt_tokens=0, completion_tokens=0, model="7"),
        ),
        ((200, "text/html", b"<html>gateway</html>"), "no chat completion"),
        ((200, "application/json", b"{not json"), "no chat completion"),
        (chat(error={"message": "overloaded"}), "no chat completion"),
        ((500, "text/plain", b"fell over"), "Error code: 500"),
    ],
)
def test_a_response_is_a_completion_or_a_failure(
    endpoint: Callable[[Response], Endpoint], response: Response, found: Completion | str
) -> None:
    reply = endpoint(response).complete([{"role": "user", "content": "x"}])
    if isinstance(found, str):
        assert isinstance(reply, Failure)
        assert found in reply.reason
    else:
        assert reply == found


def test_a_batch_that_is_refused_for_its_questions_does_not_end_a_run_that_gets_answers(
    endpoint: Callable[[Response], Endpoint],
) -> None:
    message = [{"role": "user", "content": "x"}]
    refused = [endpoint(TOO_LARGE).complete(message) for _ in range(2)]
    endpoint(TOO_LARGE).check_answers(refused[:1])
    with pytest.raises(TitaError, match="refuses every request") as error:
        endpoint(TOO_LARGE).check_answers(refused)
    assert error.value.exit_code == ExitCode.USER
    answered = endpoint(GOOD).complete(message)
    endpoint(GOOD).check_answers([answered, *refused])
    endpoint(GOOD).check_answers(refused)
    away = [Failure(reason="connection refused")] * 2
    with pytest.raises(TitaError, match="no request succeeded") as error:
        endpoint(GOOD).check_answers(away)
    assert error.value.exit_code == ExitCode.RETRY
    with pytest.raises(TitaError, match="refuses every request"):
        endpoint(GOOD).check_answers([Failure(reason="wrong key", status=401)])


def test_a_model_that_changes_under_its_name_ends_the_run(
    endpoint: Callable[[Response], Endpoint], digests: list[str]
) -> None:
    message = [{"role": "user", "content": "x"}]
    for each in ("a", "a"):
        digests[:] = [each]
        assert isinstance(endpoint(GOOD).complete(message), Completion)
    digests[:] = ["b"]
    with pytest.raises(ModelChanged, match="the model m changed while it was asked") as error:
        endpoint(GOOD).complete(message)
    assert error.value.exit_code == ExitCode.RETRY


def listed(*entries: Any) -> Response:
    return 200, "application/json", json.dumps({"object": "list", "data": entries}).encode()


@pytest.mark.parametrize(
    ("response", "told"),
    [
        (listed({"id": "m", "digest": "d", "root": "base"}), {"digest": "d"}),
        # vLLM's `created` is the time of the request.
        (
            listed({"id": "x"}, {"id": "m", "root": "/m", "parent": None, "created": 9}),
            {"root": "/m"},
        ),
        (listed({"id": "m", "meta": {"n_params": 7}}), {"meta": {"n_params": 7}}),
        (listed({"id": "m", "object": "model", "owned_by": "system"}), {}),
        (listed({"id": "another"}), {}),
        (listed(), {}),
        ((200, "application/json", b"[1]"), {}),
        ((200, "text/html", b"<html>"), {}),
        ((404, "text/plain", b"no"), {}),
        ((501, "text/plain", b"no"), {}),
        ((503, "text/plain", b"loading"), None),
    ],
)
def test_what_a_list_of_models_tells(
    endpoint: Callable[[Response], Endpoint], response: Response, told: dict[str, Any] | None
) -> None:
    if told is None:
        with pytest.raises(EndpointUnavailable, match="no request succeeded"):
            endpoint(response).identity()
    else:
        assert endpoint(response).identity() == told


def test_the_model_of_the_list_is_that_of_the_answers(
    endpoint: Callable[[Response], Endpoint], digests: list[str]
) -> None:
    url = endpoint(GOOD)._recipe.base_url
    recipe = EndpointRecipe(base_url=url, model="m", retries=0)
    digests[:] = ["b"]
    with pytest.raises(ModelChanged):
        Endpoint(recipe, where="endpoint", digest="a").complete([{"role": "user", "content": "x"}])
