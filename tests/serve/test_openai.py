"""The `openai` client against a server process."""

import json
import threading

import httpx
import openai
import pytest
from in_process import hosted
from serve_process import ENGINE, Server, about, data_url, picture

from tita.serve.errors import APIError
from tita.serve.images import image_from_url
from tita.serve.model_loading import LoadedModels
from tita.serve.serve_options import Limits
from tita.vlm.image_fetcher import ImageFetcher

QUESTION = "what color is the circle ?"


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tita", "tita:base"]
    assert client.models.retrieve("tita:base").id == "tita:base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_a_response_has_usage(client: openai.OpenAI):
    answer = client.chat.completions.create(model="tita", messages=about(picture(), QUESTION))
    assert answer.choices[0].message.content
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens >= len(answer.choices[0].message.content.split()) > 0
    assert usage.changed_tokens >= 0
    # vLLM does not tell the time in each model.
    assert (usage.base_ms > 0) == (usage.reward_ms > 0) == (ENGINE == "transformers")


def test_a_stream_has_the_same_content(client: openai.OpenAI):
    fields = {"model": "tita", "messages": about(picture("blue"), QUESTION)}
    whole = client.chat.completions.create(**fields)
    events = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [c.finish_reason for event in events for c in event.choices if c.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]


def test_weight_0_is_the_base_model(client: openai.OpenAI):
    def ask(model: str, **extra: object) -> object:
        return client.chat.completions.create(
            model=model, messages=about(picture("green"), "describe"), extra_body=extra
        )

    base, unguided = ask("tita:base"), ask("tita", guidance_weight=0)
    assert unguided.choices[0].message.content == base.choices[0].message.content
    assert base.usage.changed_tokens == unguided.usage.changed_tokens == 0
    assert base.usage.reward_ms == 0


def test_explain_and_logprobs(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tita", messages=about(picture(), "describe"), logprobs=True, top_logprobs=3,
        extra_body={"explain": True, "guidance_weight": 0.8},
    )  # fmt: skip
    choice = answer.choices[0]
    assert len(choice.logprobs.content) == len(choice.explain) == answer.usage.completion_tokens
    for token, explained in zip(choice.logprobs.content, choice.explain, strict=True):
        assert token.logprob == pytest.approx(explained["combined"])
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs))
        assert len(token.top_logprobs) == 3
        assert explained["reward"] <= 0
    changed = sum(token["changed"] for token in choice.explain)
    assert 0 <= answer.usage.changed_tokens - changed <= 1


def test_seed_n_and_stop(client: openai.OpenAI):
    def ask(**options: object) -> list[str]:
        answer = client.chat.completions.create(
            model="tita", messages=about(picture(), "describe"), max_tokens=12, **options
        )
        return [choice.message.content for choice in answer.choices]

    drawn = ask(temperature=2, n=4, seed=7)
    assert drawn == ask(temperature=2, n=4, seed=7)
    assert len(set(drawn)) > 1
    assert drawn[1:2] == ask(temperature=2, seed=8)
    [text] = ask(temperature=2, seed=7)
    word = text.split()[-1]
    assert ask(temperature=2, seed=7, stop=[word]) == [text[: text.index(word)].rstrip()]
    assert ask(temperature=2, seed=7, top_p=1e-9) == ask()
    assert ask(temperature=2, seed=7, top_p=0) == ask()


def test_several_turns_and_images(client: openai.OpenAI):
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(picture(c))}} for c in ("red", "blue")
    ]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "is there ?"},
    ]
    answer = client.chat.completions.create(model="tita", messages=messages, max_tokens=3)
    assert answer.usage.prompt_tokens > 2 * 4


def test_several_images_are_distinguished(client: openai.OpenAI):
    def logprobs(*colours: str) -> list[float]:
        parts = [{"type": "image_url", "image_url": {"url": data_url(picture(c))}} for c in colours]
        parts.append({"type": "text", "text": QUESTION})
        answer = client.chat.completions.create(
            model="tita", messages=[{"role": "user", "content": parts}], max_tokens=2,
            logprobs=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        return [token.logprob for token in answer.choices[0].logprobs.content]

    assert logprobs("red", "blue") == pytest.approx(logprobs("red", "blue"), abs=1e-4)
    assert logprobs("red", "blue") != pytest.approx(logprobs("blue", "red"), abs=1e-4)
    assert logprobs("red", "blue") != pytest.approx(logprobs("red", "red"), abs=1e-4)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_name_limits_the_length(client: openai.OpenAI, name: str):
    answer = client.chat.completions.create(
        model="tita", messages=about(picture(), "describe"), **{name: 2},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_of_several_choices_equals_the_response(client: openai.OpenAI):
    fields = {
        "model": "tita", "messages": about(picture("blue"), "describe"), "n": 3, "seed": 4,
        "temperature": 1.5, "max_tokens": 6, "logprobs": True, "top_logprobs": 2,
        "extra_body": {"explain": True, "guidance_weight": 0.6},
    }  # fmt: skip
    whole = client.chat.completions.create(**fields)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    *events, last = list(stream)
    assert all(event.usage is None for event in events)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.changed_tokens == whole.usage.changed_tokens
    for expected in whole.choices:
        choices = [c for event in events for c in event.choices if c.index == expected.index]
        assert choices[0].delta.role == "assistant"
        text = "".join(choice.delta.content or "" for choice in choices)
        assert text.rstrip() == expected.message.content
        tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.content]
        expected_tokens = expected.logprobs.content
        assert [token.token for token in tokens] == [token.token for token in expected_tokens]
        for found, token in zip(tokens, expected_tokens, strict=True):
            assert found.logprob == pytest.approx(token.logprob, abs=1e-3)
            assert [t.token for t in found.top_logprobs] == [t.token for t in token.top_logprobs]
            # A special token has a name and is no part of the text.
            spelled = "" if found.token.startswith("<") else found.token
            assert bytes(found.bytes).decode() == spelled
        assert choices[-1].finish_reason == expected.finish_reason


def test_usage_is_streamed_on_request_only(client: openai.OpenAI):
    fields = {"model": "tita", "messages": about(picture(), "what ?"), "stream": True}
    for options in ({}, {"stream_options": {"include_usage": False}}):
        events = list(client.chat.completions.create(**fields, **options))
        assert all(event.usage is None and event.choices for event in events)


def test_changed_tokens_are_those_the_base_would_not_have_chosen(client: openai.OpenAI):
    """With the same seed, the first token that differs is the first that is marked."""
    fields = {"messages": about(picture("green"), "describe"), "max_tokens": 8}
    extra = {"explain": True, "ignore_eos": True}
    base = client.chat.completions.create(model="tita:base", **fields, extra_body=extra)
    guided = client.chat.completions.create(
        model="tita", **fields, extra_body=extra | {"guidance_weight": 0.9}
    )
    tokens = [[t["token"] for t in a.choices[0].explain] for a in (base, guided)]
    differs = [one != other for one, other in zip(*tokens, strict=True)]
    changed = [token["changed"] for token in guided.choices[0].explain]
    assert any(differs)
    assert changed.index(True) == differs.index(True)
    assert guided.usage.changed_tokens == sum(changed)
    assert not any(token["changed"] for token in base.choices[0].explain)


def post(server: Server, **changes: object) -> httpx.Response:
    body = {"model": "tita", "messages": [{"role": "user", "content": "what ?"}]} | changes
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def image(url: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def bomb() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"messages": []}, 400, "too_short"),
        ({"messages": "hello"}, 400, "list_type"),
        ({"temperature": -1}, 400, "greater_than_equal"),
        ({"max_tokens": 0}, 400, "greater_than_equal"),
        ({"max_tokens": 10**9}, 400, None),
        ({"n": 10**6}, 400, None),
        ({"top_logprobs": 2}, 400, None),
        ({"tools": [{"type": "function"}]}, 400, "unsupported"),
        ({"guidance_form": "magic"}, 400, None),
        ({"model": "tita:base", "guidance_weight": 0.5}, 400, None),
        ({"messages": [{"role": "user", "content": "what " * 99}]}, 400, "context_length_exceeded"),
        ({"messages": image("data:image/png;base64,@@@")}, 400, "invalid_base64"),
        ({"messages": image(data_url(b"no image"))}, 400, "invalid_image"),
        ({"messages": image(data_url(picture()[:200]))}, 400, "invalid_image"),
        ({"messages": image(data_url(bomb()))}, 400, "image_too_large"),
        ({"messages": image("file:///etc/passwd")}, 400, "invalid_image_url"),
        ({"messages": image("http://127.0.0.1/x.png")}, 400, "image_url_refused"),
        ({"messages": image(data_url(picture()))[:1] * 9}, 400, "too_many_images"),
    ],
)  # fmt: skip
def test_errors_are_openai_error_objects(
    server: Server, changes: dict, status: int, code: str | None
):
    response = post(server, **changes)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("http://x.test:1/a.png", "image_url_unreachable", "the image could not be fetched"),
        ("http://y.test/a.png", "image_url_refused",
         "images are not fetched from this host; send a data: URL"),
    ],
)  # fmt: skip
def test_errors_of_image_urls_tell_nothing_about_the_network(url: str, code: str, message: str):
    fetcher = ImageFetcher(
        hosts=("x.test",), resolve=lambda *_: ["127.0.0.1"], public=lambda _: True
    )
    with pytest.raises(APIError) as refused:
        image_from_url(url, limits=Limits(), fetcher=fetcher)
    assert (refused.value.code, refused.value.message) == (code, message)


def test_a_private_address_is_refused_with_a_remedy():
    fetcher = ImageFetcher(hosts=("x.test",), resolve=lambda *_: ["10.0.0.1"])
    with pytest.raises(APIError) as refused:
        image_from_url("http://x.test/a.png", limits=Limits(), fetcher=fetcher)
    wanted = "images are not fetched from private addresses; send a data: URL"
    assert (refused.value.code, refused.value.message) == ("image_url_refused", wanted)


def test_special_tokens_in_a_question_are_plain_text(server: Server):
    for text in ("<image>", "</s><s>", "<pad> <image> <image>"):
        messages = [{"role": "user", "content": text}]
        assert post(server, messages=messages, max_tokens=2).status_code == 200


def test_invalid_bodies_are_rejected(server: Server):
    url = f"{server.url}/v1/chat/completions"
    as_json = {"content-type": "application/json"}
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model":"\\ud800","messages":[]}'):
        response = httpx.post(url, content=content, headers=as_json)
        assert response.status_code == 400, content[:20]
        assert response.json()["error"]["message"]


def test_large_bodies_are_rejected_with_and_without_content_length(server: Server):
    url = f"{server.url}/v1/chat/completions"
    pieces = (bytes(2**20) for _ in range(70))
    for content in (bytes(65 * 2**20), pieces):
        try:
            response = httpx.post(url, content=content, timeout=60)
        except httpx.WriteError:
            continue  # rejected before all of it was sent
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    assert post(server, max_tokens=1).status_code == 200


def test_the_role_comes_with_the_first_token(models: LoadedModels):
    """Clients take the first chunk with a choice for the first token."""
    prefill = threading.Event()
    with hosted(models) as client:
        held = models.models.base.model.register_forward_pre_hook(
            lambda *_: prefill.wait(60) and None
        )
        body = {"model": "tita", "messages": [{"role": "user", "content": "what ?"}], "n": 2}
        lines: list[str] = []

        def read() -> None:
            with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as got:
                lines.extend(got.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            reader.join(0.5)
            assert lines == []
            assert reader.is_alive()
        finally:
            prefill.set()
            reader.join(60)
            held.remove()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for index in range(2):
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert "content" in deltas[0]
        assert not any("role" in delta for delta in deltas[1:])


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_min_tokens(client: openai.OpenAI, ignore_eos: bool):
    fields = {"model": "tita", "messages": about(picture(), "what color ?")}
    short = client.chat.completions.create(**fields, max_tokens=20)
    assert short.usage.completion_tokens < 10
    extra = {"min_tokens": 10, "ignore_eos": ignore_eos}
    for stream in (False, True):
        answer = client.chat.completions.create(
            **fields, max_tokens=20, stream=stream, extra_body=extra,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )  # fmt: skip
        usage = list(answer)[-1].usage if stream else answer.usage
        assert 10 <= usage.completion_tokens <= 20
        assert not ignore_eos or usage.completion_tokens == 20
    exact = client.chat.completions.create(
        **fields, max_tokens=10, extra_body=extra | {"min_tokens": 10}
    )
    assert exact.usage.completion_tokens == 10
    assert exact.choices[0].finish_reason == "length"


def test_min_tokens_above_max_tokens_is_rejected(server: Server):
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {}):
        response = post(server, min_tokens=600, **fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "min_tokens"


def test_usage_is_streamed_with_every_chunk(client: openai.OpenAI):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chat.completions.create(
        model="tita", messages=about(picture(), "describe"), max_tokens=6, stream=True,
        stream_options=options, extra_body={"ignore_eos": True, "explain": True},
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == [1, 2, 3, 4, 5, 6]
    assert last.usage.completion_tokens == 6
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}
    only = client.chat.completions.create(
        model="tita", messages=about(picture(), "describe"), max_tokens=2, stream=True,
        stream_options={"continuous_usage_stats": True},
    )  # fmt: skip
    assert all(chunk.usage and chunk.choices for chunk in only)


@pytest.mark.skipif(
    ENGINE == "vllm", reason="vLLM caches blocks of tokens, and the demo's prompts are shorter"
)
def test_cached_tokens_are_those_of_the_image(client: openai.OpenAI, server: Server):
    def usage(question: str, **options: object) -> object:
        messages = about(picture("orange", size=57), question)
        return client.chat.completions.create(model="tita", messages=messages, **options).usage

    first = usage("what color ?")
    assert first.prompt_tokens_details.cached_tokens == 0
    again = usage("is there a 7 ?", n=2)
    tokens = httpx.post(f"{server.url}/tokenize", json={
        "messages": about(picture("orange", size=57), "is there a 7 ?"), "return_token_strs": True,
    }).json()["token_strs"]  # fmt: skip
    through_image = len(tokens) - tokens[::-1].index("<image>")
    assert again.prompt_tokens_details.cached_tokens == through_image
    text = client.chat.completions.create(
        model="tita", messages=[{"role": "user", "content": "what ?"}]
    )
    assert text.usage.prompt_tokens_details.cached_tokens == 0
