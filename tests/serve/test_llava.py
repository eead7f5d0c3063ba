"""LLaVA's protocol, called as LLaVA's scripts and front end do."""

import base64
import io
import itertools
import json
from typing import Any

import httpx
import PIL.Image
import pytest
import requests
from serve_process import Server, picture


def generate(server: Server, **changes: object) -> list[dict[str, object]]:
    """Read a stream as llava/serve/test_message.py does: JSON objects followed by a zero byte."""
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


def test_the_worker_streams_prompt_and_answer(server: Server):
    pieces = generate(server, temperature=0)
    prompt = "USER: <image>\nwhat ? ASSISTANT:"
    texts = [str(piece["text"]) for piece in pieces]
    assert all(piece["error_code"] == 0 for piece in pieces)
    assert all(text.startswith(prompt) for text in texts)
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(texts[-1]) > len(prompt)
    assert generate(server, temperature=0)[-1] == pieces[-1]


def test_the_worker_returns_errors_as_chunks(server: Server):
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


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def as_test_message(controller: str, *, model: str, message: str, sep: str) -> list[str]:
    """The calls of llava/serve/test_message.py; the outputs that it prints."""
    requests.post(controller + "/refresh_all_workers", timeout=60)
    models = requests.post(controller + "/list_models", timeout=60).json()["models"]
    models.sort()
    assert model in models
    worker = requests.post(
        controller + "/get_worker_address", json={"model": model}, timeout=60
    ).json()["address"]
    assert worker
    prompt = f"{SYSTEM}{sep}USER: {message}{sep}"
    response = requests.post(
        worker + "/worker_generate_stream",
        headers={"User-Agent": "LLaVA Client"},
        json={
            "model": model,
            "prompt": prompt,
            "max_new_tokens": 32,
            "temperature": 0.7,
            "stop": sep,
        },
        stream=True,
        timeout=60,
    )
    chunks = response.iter_lines(chunk_size=8192, decode_unicode=False, delimiter=b"\0")
    return [json.loads(chunk.decode("utf-8"))["text"].split(sep)[-1] for chunk in chunks if chunk]


@pytest.mark.parametrize("sep", ["###", " "])
def test_test_message_gets_an_answer(server: Server, sep: str):
    outputs = as_test_message(server.url, model="tita", message="what number ?", sep=sep)
    assert outputs
    assert "###" not in outputs[-1]


def as_gradio(controller: str, *, model: str, prompt: str, images: list[str], **given: Any) -> Any:
    """The calls of http_bot in llava/serve/gradio_web_server.py; the text that it finally shows."""
    worker = requests.post(
        controller + "/get_worker_address", json={"model": model}, timeout=60
    ).json()["address"]
    if worker == "":
        return "NETWORK ERROR"
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0.2,
        "top_p": 0.7,
        "max_new_tokens": 512,
        "stop": "</s>",
        "images": images,
    }
    response = requests.post(
        worker + "/worker_generate_stream",
        headers={"User-Agent": "LLaVA Client"}, json=body | given, stream=True, timeout=10,
    )  # fmt: skip
    shown = ""
    for chunk in response.iter_lines(decode_unicode=False, delimiter=b"\0"):
        if chunk:
            data = json.loads(chunk.decode())
            if data["error_code"] != 0:
                return data["text"] + f" (error_code: {data['error_code']})"
            shown = data["text"][len(prompt) :].strip()
    return shown


def as_jpeg(colour: str) -> str:
    """An image in the encoding of the front end."""
    out = io.BytesIO()
    PIL.Image.open(io.BytesIO(picture(colour, size=400))).convert("RGB").save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def test_the_front_end_shows_an_answer(server: Server):
    question = "what color is the circle ?"
    prompt = f"USER: <image>\n{question} ASSISTANT:"
    shown = as_gradio(
        server.url, model="tita", prompt=prompt, images=[as_jpeg("blue")], temperature=0
    )
    assert shown
    # A second turn, in the front end's format.
    longer = f"{prompt} {shown}</s>USER: is there a 7 ? ASSISTANT:"
    again = as_gradio(server.url, model="tita", prompt=longer, images=[as_jpeg("blue")])
    assert "error_code" not in again
    alone = as_gradio(server.url, model="tita:base", prompt=prompt, images=[as_jpeg("blue")])
    assert "error_code" not in alone


def test_the_front_end_shows_errors(server: Server):
    prompt = "USER: <image>\nwhat ? ASSISTANT:"
    fields = {"model": "tita", "prompt": prompt, "images": [as_jpeg("red")]}
    assert as_gradio(server.url, **fields | {"model": "llava-v1.5-7b"}) == "NETWORK ERROR"
    for wrong in ({"images": []}, {"images": [as_jpeg("red")] * 2}, {"max_new_tokens": 0}):
        assert as_gradio(server.url, **fields | wrong).endswith("(error_code: 1)"), wrong


def test_numbers_as_strings_and_unknown_fields_are_accepted(server: Server):
    """LLaVA's worker casts numbers and ignores unknown fields."""
    pieces = generate(server, temperature="0", top_p="0.9", max_new_tokens="3", n_samples=2)
    assert pieces == generate(server, temperature=0, max_new_tokens=3)
    assert pieces == generate(server, temperature=1, top_p=0, max_new_tokens=3)


def test_guidance_fields_are_accepted(server: Server):
    def answer(**fields: object) -> str:
        return str(generate(server, temperature=0, **fields)[-1]["text"])

    base = answer(model="tita:base")
    assert answer(guidance_weight=0) == base
    strong = {"guidance_weight": 2.5, "prompt": "USER: <image>\ndescribe ASSISTANT:"}
    assert answer(**strong) != answer(**strong | {"guidance_weight": 0})
    assert answer(**strong, guidance_plausibility=1) == answer(**strong | {"guidance_weight": 0})
    assert answer(**strong, guidance_form="dpo")
    [piece] = generate(server, guidance_form="magic")
    assert piece["error_code"] == 1


def test_llavas_own_controller_can_register_this_worker(server: Server):
    """The controller requests the status of a worker that is registered manually."""
    status = requests.post(f"{server.url}/worker_get_status", timeout=60)
    assert status.status_code == 200
    assert {"model_names", "speed", "queue_length"} <= status.json().keys()
