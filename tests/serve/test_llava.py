"""LLaVA's own scripts, as they call controller and worker."""

import base64
import itertools
import json

import httpx
from serve_process import Server, picture


def generate(server: Server, **changes: object) -> list[dict[str, object]]:
    """As llava/serve/test_message.py reads it: JSON objects, each ended by a zero byte."""
    body = {
        "model": "tita",
        "prompt": "USER: <image>\nwhat ? ASSISTANT:",
        "images": [base64.b64encode(picture()).decode()],
        "max_new_tokens": 12,
        "temperature": 0.7,
        "stop": "</s>",
    } | changes
    pieces = []
    address = httpx.post(f"{server.url}/get_worker_address", json={"model": "tita"}).json()
    with httpx.stream(
        "POST", f"{address['address']}/worker_generate_stream", json=body, timeout=60
    ) as response:
        assert response.status_code == 200
        rest = b""
        for content in response.iter_bytes():
            *whole, rest = (rest + content).split(b"\0")
            pieces += [json.loads(each) for each in whole]
    assert rest == b""
    return pieces


def test_controller_calls(server: Server):
    post = lambda path, **body: httpx.post(f"{server.url}/{path}", json=body).json()  # noqa: E731
    assert post("refresh_all_workers") is None
    assert post("list_models") == {"models": ["tita", "tita:base"]}
    assert post("get_worker_address", model="tita") == {"address": server.url}
    assert post("get_worker_address", model="vicuna") == {"address": ""}
    status = post("worker_get_status")
    assert status["model_names"] == ["tita", "tita:base"]
    assert status["queue_length"] == 0


def test_a_worker_streams_prompt_and_answer(server: Server):
    pieces = generate(server, temperature=0)
    prompt = "USER: <image>\nwhat ? ASSISTANT:"
    texts = [str(piece["text"]) for piece in pieces]
    assert all(piece["error_code"] == 0 for piece in pieces)
    assert all(text.startswith(prompt) for text in texts)
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(texts[-1]) > len(prompt)
    assert generate(server, temperature=0)[-1] == pieces[-1]


def test_a_worker_tells_errors_in_pieces(server: Server):
    for changes in (
        {"images": []},
        {"images": ["@@@"]},
        {"images": [base64.b64encode(b"no image").decode()]},
        {"model": "vicuna"},
        {"prompt": "what " * 100, "images": []},
    ):
        [piece] = generate(server, **changes)
        assert piece["error_code"] == 1
        assert "Traceback" not in str(piece["text"])
