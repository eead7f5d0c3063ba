"""Text completions, and the tokenizer's API."""

import json
from typing import Any

import httpx
import openai
import pytest
from serve_process import Server, about, picture

PROMPT = "user: describe the image assistant:"
FIELDS: dict[str, Any] = {"model": "tita", "max_tokens": 6, "temperature": 1.5, "seed": 3}


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_token_ids_answer_as_the_text_does(server: Server, client: openai.OpenAI):
    text = client.completions.create(**FIELDS, prompt=PROMPT)
    assert text.choices[0].text
    assert text.usage.completion_tokens <= 6
    tokens = post(server, "/tokenize", prompt=PROMPT)["tokens"]
    assert text.usage.prompt_tokens == len(tokens)
    ids = client.completions.create(**FIELDS, prompt=tokens)
    assert (ids.choices, ids.usage.prompt_tokens) == (text.choices, len(tokens))


def test_the_prompt_is_not_put_into_a_template(server: Server, client: openai.OpenAI):
    """A chat is the completion of its templated text."""
    messages = [{"role": "user", "content": "is there a 7 ?"}]
    tokens = post(server, "/tokenize", messages=messages)["tokens"]
    chat = client.chat.completions.create(**FIELDS, messages=messages)
    raw = client.completions.create(**FIELDS, prompt=tokens)
    assert raw.choices[0].text == chat.choices[0].message.content
    assert raw.usage.prompt_tokens == chat.usage.prompt_tokens == len(tokens)


def test_several_prompts_are_answered_in_order(client: openai.OpenAI):
    prompts = [PROMPT, "user: is there a 7 ? assistant:"]
    both = client.completions.create(**FIELDS, prompt=prompts, n=2)
    alone = [client.completions.create(**FIELDS, prompt=prompt, n=2) for prompt in prompts]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    expected = [choice.text for each in alone for choice in each.choices]
    assert [choice.text for choice in both.choices] == expected
    assert both.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)
    assert both.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)


def test_a_stream_equals_the_response(client: openai.OpenAI):
    fields = FIELDS | {"prompt": [PROMPT, "user: what ? assistant:"], "n": 2, "logprobs": 2}
    whole = client.completions.create(**fields)
    *chunks, last = client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens
    for expected in whole.choices:
        choices = [c for chunk in chunks for c in chunk.choices if c.index == expected.index]
        assert "".join(choice.text for choice in choices).rstrip() == expected.text
        assert choices[-1].finish_reason == expected.finish_reason
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
        assert tokens == expected.logprobs.tokens
        offsets = [at for choice in choices for at in choice.logprobs.text_offset]
        assert offsets == expected.logprobs.text_offset
        text = "".join(choice.text for choice in choices)
        for token, at in zip(tokens, offsets, strict=True):
            assert token.startswith("<") or text[at:].startswith(token)
        assert all(len(top) == 2 for top in expected.logprobs.top_logprobs)


def test_the_number_of_tokens_has_the_name_of_the_chat_api_too(client: openai.OpenAI):
    """Load generators send both names to all APIs."""
    extra = {"ignore_eos": True, "max_completion_tokens": 3}
    answer = client.completions.create(model="tita", prompt=PROMPT, extra_body=extra, max_tokens=3)
    alone = client.completions.create(model="tita", prompt=PROMPT, extra_body=extra)
    assert answer.usage.completion_tokens == alone.usage.completion_tokens == 3


def test_sixteen_tokens_by_default(client: openai.OpenAI):
    answer = client.completions.create(model="tita", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [[1], [1.5]]}, "prompt.1.0"),
        ({"prompt": "<image>"}, "prompt"),
        ({"prompt": "what " * 300_000}, "prompt"),
        ({"prompt": [PROMPT] * 17}, "n"),
        ({"prompt": [PROMPT] * 9, "n": 2}, "n"),
        ({"prompt": [1] * 5000}, "prompt"),
        ({"prompt": [PROMPT, 7]}, "prompt.1"),
        ({"prompt": None}, "prompt"),
        ({"min_tokens": 7}, "min_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": [], "max_completion_tokens": None, "explain": False}, None),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"explain": True}, "explain"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_invalid_requests_are_refused(server: Server, changes: dict[str, Any], param: str | None):
    body = FIELDS | {"prompt": PROMPT} | changes
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    if param is None:
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_one_bad_prompt_of_several_leaves_nothing_running(server: Server):
    body = FIELDS | {"prompt": [[1, 2], [1] * 5000], "max_tokens": 100, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert server.idle_within(60)


class TestTokenizer:
    """The tokens that the base model gets."""

    def test_messages_with_an_image(self, server: Server, client: openai.OpenAI):
        messages = about(picture(), "what color ?")
        found = post(server, "/tokenize", model="tita", messages=messages, return_token_strs=True)
        usage = client.chat.completions.create(model="tita", messages=messages, max_tokens=1).usage
        assert found["count"] == len(found["tokens"]) == usage.prompt_tokens
        assert found["token_strs"].count("<image>") > 1
        assert found["max_model_len"] == client.models.retrieve("tita").max_model_len

    def test_text_and_back(self, server: Server):
        text = "is there a 7 ?"
        found = post(server, "/tokenize", prompt=text)
        assert found["token_strs"] is None
        without = post(server, "/tokenize", prompt=text, add_special_tokens=False)
        assert found["tokens"][-without["count"] :] == without["tokens"]
        back = post(server, "/detokenize", model="tita", tokens=without["tokens"])
        assert back == {"prompt": text}
        assert post(server, "/detokenize", tokens=[]) == {"prompt": ""}

    def test_text_longer_than_the_context(self, server: Server):
        found = post(server, "/tokenize", prompt="what " * 5000)
        assert found["count"] >= 5000 > found["max_model_len"]

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/tokenize", {}, 400),
            ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
            ("/tokenize", {"model": "gpt", "prompt": "x"}, 404),
            ("/tokenize", {"prompt": "x" * 2**21}, 400),
            ("/tokenize", {"prompt": " "}, 400),
            ("/tokenize", {"messages": about(b"no image", "?")}, 400),
            ("/detokenize", {"tokens": [10**6]}, 400),
            ("/detokenize", {"tokens": [-1]}, 400),
            ("/detokenize", {"tokens": ["1"]}, 400),
            ("/detokenize", {"model": "gpt", "tokens": []}, 404),
        ],
    )
    def test_errors(self, server: Server, path: str, body: dict[str, Any], status: int):
        response = httpx.post(server.url + path, json=body, timeout=60)
        assert response.status_code == status, response.text
        assert set(json.loads(response.text)["error"]) == {"message", "type", "param", "code"}
        assert server.idle_within(60)
