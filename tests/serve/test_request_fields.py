"""Fields of requests: strict types, misspelt and unknown names, and prompts without a token."""

from itertools import product
from typing import Any

import httpx
import pytest
from serve_process import Server, data_url, picture

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
WORKER = "/worker_generate_stream"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tita", "messages": [{"role": "user", "content": "what ?"}], "max_tokens": 2},
    TEXT: {"model": "tita", "prompt": "user: what ? assistant:", "max_tokens": 2},
    WORKER: {"model": "tita", "prompt": "user: what ? assistant:", "max_new_tokens": 2},
    "/tokenize": {"prompt": "what ?"},
}
IGNORED = "x-tita-ignored-fields"


def post(server: Server, path: str, **changes: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=BODIES[path] | changes, timeout=60)


def message(response: httpx.Response) -> str:
    if response.headers["content-type"] == "application/json":
        return str(response.json()["error"]["message"])
    return response.text


WRONG_TYPES: list[dict[str, Any]] = [
    {"max_tokens": "5"}, {"max_tokens": True}, {"max_tokens": 1.5}, {"temperature": True},
    {"temperature": "0"}, {"top_p": "1"}, {"top_k": True}, {"seed": "1"}, {"n": "1"},
    {"n": True}, {"stream": "no"}, {"stream": 0}, {"stream": "false"}, {"ignore_eos": 1},
    {"min_tokens": "1"}, {"repetition_penalty": True}, {"guidance_weight": "0.5"},
    {"guidance_weight": True}, {"guidance_plausibility": "1"},
    {"stream": True, "stream_options": {"include_usage": "yes"}},
    {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("changes", WRONG_TYPES, ids=repr)
def test_types_are_strict(server: Server, path: str, changes: dict[str, Any]):
    response = post(server, path, **changes)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(list(changes)[-1])


def test_further_types_of_one_api_are_strict(server: Server):
    for changes in ({"logprobs": 1}, {"logprobs": True, "top_logprobs": "1"}, {"explain": "no"}):
        assert post(server, CHAT, **changes).status_code == 400, changes
    for changes in ({"logprobs": True}, {"prompt": [1.5]}, {"prompt": [True]}, {"prompt": [[]]}):
        assert post(server, TEXT, **changes).status_code == 400, changes
    # LLaVA's worker casts numbers, but a boolean is none.
    for changes in ({"temperature": True}, {"top_k": True}, {"max_new_tokens": "many"}):
        assert post(server, WORKER, **changes).status_code == 400, changes


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_whole_number_may_have_a_decimal_point(server: Server, path: str):
    response = post(server, path, max_tokens=2.0, seed=7.0, n=1.0)
    assert response.status_code == 200, response.text


MISSPELT = {
    "guidance_weigth": "guidance_weight", "guidanceWeight": "guidance_weight",
    "guidance-form": "guidance_form", "temprature": "temperature", "Temperature": "temperature",
    "topP": "top_p", "stops": "stop", "min_token": "min_tokens", "ignore_eos_": "ignore_eos",
}  # fmt: skip


NOT_THE_WORKERS = {"min_token", "ignore_eos_"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *product((CHAT, TEXT), MISSPELT),
        *product((WORKER,), sorted(MISSPELT.keys() - NOT_THE_WORKERS)),
    ],
)
def test_misspelt_names_are_refused(server: Server, path: str, name: str):
    response = post(server, path, **{name: 1})
    assert response.status_code == 400, response.text
    assert f"did you mean {MISSPELT[name]}?" in message(response)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"extra_body": {"guidance_weight": 2}}, "at the top level"),
        ({"truncate_prompt_tokens": 5}, ""),
        ({"mm_processor_kwargs": {"num_crops": 4}}, ""),
        ({"chat_template_kwargs": {"enable_thinking": False}}, ""),
        ({"max_new_tokens": 5}, "use max_tokens"),
        ({"repeat_penalty": 1.2}, "use repetition_penalty"),
        ({"options": {"num_predict": 5}}, ""),
        ({"images": ["QUJD"]}, ""),
        ({"max_output_tokens": 5}, "use max_tokens"),
        ({"stop_sequences": ["what"]}, "use stop"),
        ({"do_sample": True}, "use temperature"),
        ({"num_return_sequences": 2}, "use n"),
        ({"guidance_scale": 1.5}, "use guidance_weight"),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(
    server: Server, path: str, changes: dict[str, Any], remedy: str
):
    response = post(server, path, **changes)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (*changes, "unsupported")
    assert remedy in error["message"]


WORDS = {"type": "text", "text": "what"}
URL = {"url": "data:image/png;base64,AA=="}
IMAGE = {"type": "image_url", "image_url": URL}


@pytest.mark.parametrize(
    ("message_", "param"),
    [
        ({"role": "user", "content": "what", "images": ["QUJD"]}, "images"),
        ({"role": "user", "content": [WORDS | {"image_url": URL}]}, "content.0.image_url"),
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": URL | {"max_pixels": 9}}],
            },
            "content.0.image_url.max_pixels",
        ),
        ({"role": "assistant", "content": "a", "prefix": True}, "prefix"),
        ({"role": "user", "content": [IMAGE | {"text": "what"}]}, "content.0.text"),
    ],
)
def test_what_a_message_has_beside_its_content_is_refused(
    server: Server, message_: dict[str, Any], param: str
):
    """An image that is left out changes the answer."""
    response = post(server, CHAT, messages=[message_])
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (f"messages.0.{param}", "unsupported")


def test_harmless_fields_of_messages_are_ignored(server: Server):
    parts = [WORDS | {"cache_control": {"type": "ephemeral"}, "annotations": []}]
    sent = [{"role": "user", "content": parts, "name": "ada", "images": [], "session": 1}]
    response = post(server, CHAT, messages=sent)
    assert response.status_code == 200, response.text
    assert response.headers[IGNORED] == "messages.0.session"


@pytest.mark.parametrize(
    "body", [b"\xff{", b'{"a":' * 9999, b'{"max_tokens":' + b"9" * 9999 + b"}"], ids=range(3)
)
def test_what_is_no_json_is_called_so(server: Server, body: bytes):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{CHAT}", content=body, headers=headers, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the request body is not valid JSON"


@pytest.mark.parametrize(
    ("stop", "what"),
    [(["x"] * 17, "at most 16 items"), ("x" * 5000, "at most 4096 char"), (7, "valid string")],
)
def test_what_is_wrong_with_stop_strings_is_said(server: Server, stop: Any, what: str):
    response = post(server, CHAT, stop=stop)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stop")
    assert what in message(response)


@pytest.mark.parametrize("body", [b"null", b"[]", b'"tita"', b""])
def test_a_body_that_is_no_object_is_called_so(server: Server, body: bytes):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{CHAT}", content=body, headers=headers, timeout=30)
    assert response.status_code == 400
    assert message(response) == "the request body must be a JSON object"


def test_the_tokenizer_refuses_them_too(server: Server):
    response = post(server, "/tokenize", chat_template_kwargs={"enable_thinking": False})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported"
    misspelt = post(server, "/tokenize", add_special_token=False)
    assert "did you mean add_special_tokens?" in message(misspelt)
    assert post(server, "/tokenize", session=1).headers[IGNORED] == "session"


def test_a_misspelt_stream_option_is_refused(server: Server):
    options = {"include_usgae": True}
    response = post(server, CHAT, stream=True, stream_options=options)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options.include_usgae"


@pytest.mark.parametrize("path", [CHAT, TEXT, WORKER])
def test_other_unknown_fields_are_named_in_the_response(server: Server, path: str):
    odd = {"a\r\nset-cookie: x": 1, "\u00fc": 2, "y" * 99: 3}
    response = post(server, path, trace_parent="00-1", session=7, user="u", **odd)
    assert response.status_code == 200, response.text
    assert response.headers[IGNORED] == "trace_parent, session, and 3 more"
    assert "set-cookie" not in response.headers
    many = {f"x{number}": 1 for number in range(500)}
    found = post(server, path, **many).headers[IGNORED]
    assert found.endswith("and 484 more")
    assert len(found) < 200
    plain = post(server, path, user="u")
    assert plain.status_code == 200
    assert IGNORED not in plain.headers


def test_the_number_of_unknown_fields_is_bounded(server: Server):
    """A megabyte of their names would take the server ten seconds, and 64 ten minutes."""
    fields = {f"x{number}": 1 for number in range(600)}
    parts = [WORDS | fields, WORDS | fields]
    for sent in (
        {f"x{number}": 1 for number in range(50_000)},
        {"messages": [{"role": "user", "content": parts}]},
    ):
        response = post(server, CHAT, **sent)
        assert response.status_code == 400
        assert message(response) == "more than 1,000 unknown fields"


def test_a_stream_names_them_too(server: Server):
    response = post(server, CHAT, stream=True, stream_options={"x": 1, "include_obfuscation": True})
    assert response.headers[IGNORED] == "stream_options.x"


BLANK = ("", " ", "\n\t ", "\u2003\u00a0")


@pytest.mark.parametrize("text", BLANK, ids=repr)
def test_a_blank_prompt_is_refused_at_every_api(server: Server, text: str):
    turns = [{"role": "system", "content": text}, {"role": "user", "content": [
        {"type": "text", "text": text}, {"type": "text", "text": text},
    ]}]  # fmt: skip
    refused = [
        post(server, WORKER, prompt=text),
        post(server, TEXT, prompt=text),
        post(server, TEXT, prompt=["what ?", text]),
        post(server, TEXT, prompt=[]),
        post(server, TEXT, prompt=[[1], []]),
        post(server, CHAT, messages=[{"role": "user", "content": text}]),
        post(server, CHAT, messages=turns),
        post(server, CHAT, messages=[{"role": "assistant"}]),
        httpx.post(f"{server.url}/tokenize", json={"messages": turns}),
    ]
    for response in refused:
        assert response.status_code == 400, (response.request.content, response.text)
        assert message(response)
    assert "Traceback" not in server.log


def test_an_image_alone_is_a_prompt(server: Server):
    image = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": ""}]}]
    assert post(server, CHAT, messages=messages).status_code == 200
