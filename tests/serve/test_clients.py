"""Fields that clients send by default: ignored if they request nothing, rejected by name if not."""

import gzip
import json
from typing import Any

import httpx
import openai
import pytest
from serve_process import Server, data_url, picture

URL = data_url(picture())
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
USER_MESSAGE = {"role": "user", "content": "what ?"}


def ask(server: Server, **changes: Any) -> httpx.Response:
    body = {"model": "tita", "messages": [USER_MESSAGE], "max_tokens": 2} | changes
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def of(*content: Any, role: str = "user", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content), **fields}]}


def between(**message: Any) -> dict[str, Any]:
    """A conversation with this assistant message."""
    return {"messages": [USER_MESSAGE, {"role": "assistant", **message}, USER_MESSAGE]}


LITELLM = {
    "user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": False,
    "service_tier": "auto", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
    "tools": None, "functions": [], "response_format": {"type": "text"}, "n": 1, "seed": None,
    "stop": None, "reasoning_effort": "low", "modalities": ["text"], "tool_choice": "auto",
    "stream": False, "stream_options": None, "logprobs": False, "top_logprobs": None,
}  # fmt: skip
VLLM = {
    "top_k": -1, "repetition_penalty": 1.0, "ignore_eos": None, "explain": None, "min_p": 0.0,
    "min_tokens": 0, "skip_special_tokens": True, "add_generation_prompt": True, "best_of": 1,
    "stop_token_ids": [], "use_beam_search": False, "guided_json": None, "prompt_logprobs": None,
    "chat_template_kwargs": {}, "length_penalty": 1.0, "spaces_between_special_tokens": True,
}  # fmt: skip

LMDEPLOY = {
    "top_p": 0.8, "top_k": 40, "repetition_penalty": 1.0, "ignore_eos": False, "session_id": -1,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "stop": None,
    "include_stop_str_in_output": False, "min_new_tokens": None, "min_p": 0.0, "logprobs": False,
    "do_preprocess": True, "enable_thinking": None, "return_token_ids": False, "tools": None,
}  # fmt: skip
"""As VLMEvalKit sends them, too."""
OPEN_WEBUI = {
    "max_tokens": None, "max_completion_tokens": 1000, "chat_id": "x", "session_id": "y",
    "id": "z", "metadata": {"task": "title_generation"}, "features": {}, "variables": {},
    "background_tasks": {}, "user": {"name": "bob"},
}  # fmt: skip
"""Of its requests for titles, which have no image."""


@pytest.mark.parametrize(
    "changes",
    [
        LITELLM,
        VLLM,
        LMDEPLOY,
        OPEN_WEBUI,
        {"tools": [TOOL], "tool_choice": "none"},
        {"stop": ""},
        {"stop": ["", "x", "y", "z", "v"]},
        {"tool_ids": None, "template": None, "modle": None},
        of({"type": "image_url", "image_url": URL}),
        of({"type": "image_url", "image_url": f" {URL.replace('+', '%2B').replace('=', '%3D')}\n"}),
        of({"type": "image_url", "image_url": URL.replace("image/png", "image")}),
        of({"type": "image_url", "image_url": {"url": URL, "detail": None}}),
        of({"type": "image_url", "image_url": {"url": URL, "detail": "original"}}),
        of({"type": "text", "text": "what", "cache_control": {"type": "ephemeral"}}, name="bob"),
        of({"type": "text", "text": "be brief"}, role="developer"),
        between(content=None),
        between(),
        between(content="", refusal=None, tool_calls=None, function_call=None, annotations=[]),
        between(content="no", tool_calls=[]),
        between(content="no", context=None, audio=None),
    ],
)
def test_fields_that_request_nothing_are_ignored(server: Server, changes: dict[str, Any]):
    response = ask(server, **changes)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"tools": [TOOL]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"functions": [{"name": "look"}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": -100}}, "logit_bias", "not supported"),
        ({"min_p": 0.1}, "min_p", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "not supported"),
        ({"guided_choice": ["yes", "no"]}, "guided_choice", "not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
        ({"top_k": -2}, "top_k", "greater than or equal"),
        (of({"type": "input_image", "image_url": URL}), "messages.0.content.0", "'image_url'"),
        (
            of({"type": "file"}),
            "messages.0.content.0",
            "'type' 'file' is not supported; use 'text'",
        ),
        (of({"text": "what"}), "messages.0.content.0", "should have a 'type'"),
        (of(URL), "messages.0.content.0", "should be a JSON object"),
        (of({"type": "text"}), "messages.0.content.0.text", "required"),
        (of({"type": "text", "text": 7}), "messages.0.content.0.text", "string"),
        (of({"type": "image_url"}), "messages.0.content.0.image_url", "required"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is required"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        (between(content=None, tool_calls=[{"id": "1"}]), "messages.1", "tool_calls"),
        ({"stop": [["x"]]}, "stop.0", "string"),
        (
            {"messages": [USER_MESSAGE | {"content": "what " * 99}]},
            "messages",
            "maximum context length is",
        ),
        ({"model": None}, "model", "string"),
        ({"guidance_text": "x"}, "guidance_text", "adds no text"),
        ({"guidance_noise_step": 9}, "guidance_noise_step", "no effect on form tita"),
        ({"guidance_contrast": 2}, "guidance_contrast", "no effect on form tita"),
    ],
)
def test_unsupported_fields_are_named_in_the_error(
    server: Server, changes: dict, param: str, message: str
):
    response = ask(server, **changes)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("sent", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_without_json_content_type_is_rejected(server: Server, sent: str | None):
    """As `curl -d` sends it by default."""
    body = b'{"model": "tita", "messages": [{"role": "user", "content": "what ?"}]}'
    headers = {} if sent is None else {"content-type": sent}
    url = f"{server.url}/v1/chat/completions"
    response = httpx.post(url, content=body, headers=headers, timeout=60)
    assert response.status_code == 415
    error = response.json()["error"]
    assert error["code"] == "unsupported_media_type"
    assert "application/json" in error["message"]


def test_a_compressed_body_is_called_so(server: Server):
    body = gzip.compress(json.dumps({"model": "tita", "messages": [USER_MESSAGE]}).encode())
    url = f"{server.url}/v1/chat/completions"
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = httpx.post(url, content=body, headers=headers, timeout=60)
    assert (response.status_code, response.json()["error"]["message"]) == (
        415,
        "content-encoding gzip is not supported; send the body as it is",
    )
    headers["content-encoding"] = "identity"
    assert httpx.post(url, content=b"{", headers=headers, timeout=60).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "remedy"),
    [
        ("POST", "/chat/completions", "use /v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "use /v1/chat/completions"),
        ("GET", "//v1/models", "use /v1/models"),
        ("POST", "/v1/responses", "use /v1/chat/completions"),
        ("POST", "/v1/embeddings", "/openapi.json lists the paths"),
        ("GET", "/v1/chat/completions", "use POST"),
    ],
)
def test_the_error_of_a_wrong_path_says_the_right_one(
    server: Server, method: str, path: str, remedy: str
):
    """As clients send that have a base URL without /v1, or that use another API."""
    response = httpx.request(method, server.url + path)
    assert response.status_code in (404, 405)
    assert response.json()["error"]["message"].endswith(f": {method} {path}; {remedy}")


def test_what_is_wrong_with_an_image_is_said_with_a_remedy(server: Server):
    cut = data_url(picture(size=200)[:-60])
    for url, what in ((cut, "truncated"), (data_url(b"<svg/>"), "not a readable image")):
        response = ask(server, **of({"type": "image_url", "image_url": url}))
        assert (response.status_code, response.json()["error"]["message"]) == (
            400,
            f"image: {what}; replace the file, for example by a JPEG or PNG",
        )


PLACES = ("/", "/healthz", "/health", "/readyz", "/metrics", "/v1/models", "/v1/models/tita:base")


@pytest.mark.parametrize("path", PLACES)
def test_head_is_get_without_the_body(server: Server, path: str):
    whole, head = (httpx.request(method, server.url + path) for method in ("GET", "HEAD"))
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_an_offer_of_http_2_leaves_the_body_alone(server: Server):
    """As Java's HttpClient, and with it Spring AI and LangChain4j, makes it by default."""
    offer = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA",
    }
    body = {"model": "tita", "messages": [USER_MESSAGE], "max_tokens": 2}
    with httpx.Client(base_url=server.url, headers=offer, timeout=60) as client:
        for _ in range(2):
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            assert response.http_version == "HTTP/1.1"


def test_a_trailing_slash_is_ignored(server: Server):
    """Without a redirect, whose address would be wrong behind a proxy."""
    for path in PLACES:
        assert httpx.get(f"{server.url}{path}/").status_code == 200, path
    url = f"{server.url}/v1/chat/completions/"
    body = {"model": "tita", "messages": [USER_MESSAGE], "max_tokens": 2}
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    assert httpx.post(f"{server.url}/list_models/").json()["models"]


def test_a_request_may_name_the_whole_url(server: Server):
    """As clients send it to a forward proxy (RFC 9112, 3.2.2): its host counts."""
    with httpx.Client(proxy=server.url, timeout=60) as client:
        for path in (*PLACES, "", "/v1/models/?limit=1"):
            assert client.get(f"http://tita.test{path}").status_code == 200, path
        body = {"model": "tita", "messages": [USER_MESSAGE], "max_tokens": 2}
        answer = client.post("http://tita.test/v1/chat/completions", json=body)
        assert answer.status_code == 200
        found = client.post(
            "http://tita.test:81/get_worker_address", json=body, headers={"host": "other"}
        )
        assert found.json() == {"address": "http://tita.test:81"}
        assert client.get("http://tita.test/v1/nothing").status_code == 404
    with httpx.Client(base_url=server.url) as client:
        for target in (b"http:///healthz", b"ftp://tita.test/healthz"):
            assert client.get("/", extensions={"target": target}).status_code == 404, target


def test_a_response_message_can_be_sent_back(client: openai.OpenAI):
    fields = {"model": "tita", "max_tokens": 2}
    reply = client.chat.completions.create(messages=[USER_MESSAGE], **fields).choices[0].message
    for message in (reply, reply.model_dump()):
        again = client.chat.completions.create(
            messages=[USER_MESSAGE, message, USER_MESSAGE], **fields
        )
        assert again.choices[0].finish_reason


def test_a_refusal_is_what_the_assistant_said(server: Server):
    """Conversations with OpenAI's models have it instead of content."""
    texts: list[dict[str, Any]] = [
        {"content": "no"},
        {"content": None, "refusal": "no"},
        {"refusal": "no"},
        {"content": "no", "refusal": None},
    ]
    url = f"{server.url}/tokenize"
    tokens = [httpx.post(url, json=between(**text)).json()["tokens"] for text in texts]
    assert tokens == tokens[:1] * 4
    assert httpx.post(url, json=between()).json()["tokens"] != tokens[0]


def test_the_openai_client_shows_which_model_gave_an_answer(client: openai.OpenAI):
    fields = {"model": "tita", "messages": [USER_MESSAGE], "max_tokens": 2}
    [card, _] = client.models.list()
    raw = client.chat.completions.with_raw_response.create(**fields)
    assert raw.headers["x-tita-model-digest"] == card.digest
    assert raw.parse().system_fingerprint == card.system_fingerprint
    with client.chat.completions.with_streaming_response.create(**fields, stream=True) as stream:
        assert stream.headers["x-tita-model-digest"] == card.digest
        chunks = list(stream.parse())
    assert {chunk.system_fingerprint for chunk in chunks} == {card.system_fingerprint}


def test_the_openai_client_reads_the_fields_of_vllm(client: openai.OpenAI):
    """As load generators send and read them."""
    extra = {"min_tokens": 4, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    fixed = {"model": "tita", "max_tokens": 4, "extra_body": extra}
    chat = client.chat.completions.create(**fixed, messages=[USER_MESSAGE])
    text = client.completions.create(**fixed, prompt=[1, 5, 6])
    for answer in (chat, text):
        assert answer.usage.completion_tokens == 4
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert text.usage.prompt_tokens == 3
    streams = (
        client.chat.completions.create(
            **fixed, messages=[USER_MESSAGE], stream=True, stream_options=options
        ),
        client.completions.create(**fixed, prompt="what ?", stream=True, stream_options=options),
    )
    for stream in streams:
        *chunks, last = stream
        assert [chunk.usage.total_tokens for chunk in chunks]
        assert (last.choices, last.usage.completion_tokens) == ([], 4)


def test_ignored_fields_are_in_a_header_of_the_response(client: openai.OpenAI):
    raw = client.chat.completions.with_raw_response.create(
        model="tita", messages=[USER_MESSAGE], max_tokens=2, extra_body={"my_tag": "a"}, user="u"
    )
    assert raw.headers["x-tita-ignored-fields"] == "my_tag"
