"""`tita ask`: one question to a server, the answer as it comes."""

import base64
import json
import mimetypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tita.errors import JobFailed, TitaError


def ask(
    question: str,
    *,
    url: str,
    images: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> None:
    """Print the answer on standard output as it streams, and what it cost on standard error.

    Args:
        question: what to ask.
        url: of the server, with or without `/v1`.
        images: paths, or URLs that the server is to fetch.
        fields: of the request's body; those that are None are left to the server.
        api_key: bearer key.

    Raises:
        TitaError: no such server, no such file, or it refused (`JobFailed` where asking again may
            help).
    """
    address = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=address, headers=headers, timeout=600) as client:
            body = {
                "messages": [{"role": "user", "content": _content(question, images)}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "explain": True,
            }
            body |= {name: value for name, value in (fields or {}).items() if value is not None}
            if "model" not in body:
                body["model"] = _first_model(client)
            _show(_events(client, body))
    except (ValueError, KeyError, IndexError, TypeError):
        raise TitaError(
            "what answers there does not speak OpenAI's API", where=address, remedy="check --url"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise TitaError(
            f"no answer ({reason})", where=address, remedy="check --url, and that it runs"
        ) from None


def _content(question: str, images: Sequence[str]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _image_url(image)}} for image in images
    ]
    return [*parts, {"type": "text", "text": question}]


def _image_url(image: str) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    kind = mimetypes.guess_type(image)[0] or "application/octet-stream"
    data = base64.b64encode(Path(image).expanduser().read_bytes()).decode()
    return f"data:{kind};base64,{data}"


def _first_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    _check(response)
    return str(response.json()["data"][0]["id"])


def _events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
        _check(response)
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                yield json.loads(line[len("data: ") :])
    raise JobFailed("the answer broke off", where=str(client.base_url), remedy="ask again")


def _show(events: Iterator[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    usage: dict[str, Any] = {}
    for event in events:
        if "error" in event:
            raise JobFailed(event["error"]["message"], remedy="ask again")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            changed = any(token["changed"] for token in choice.get("explain") or [])
            text = choice["delta"].get("content") or ""
            console.print(Text(text, style="bold green" if changed else ""), end="")
    console.print()
    print(_cost(usage), file=sys.stderr)


def _cost(usage: Mapping[str, Any]) -> str:
    cost = f"{usage.get('completion_tokens', 0)} tokens"
    if "changed_tokens" not in usage:
        return cost  # a server of another kind
    return (
        f"{cost}, {usage['changed_tokens']} changed; "
        f"base {usage['base_ms']:.0f} ms, reward {usage['reward_ms']:.0f} ms"
    )


_REMEDIES = {401: "give --api-key, or TITA_API_KEY", 404: "give another --model or --url"}


def _check(response: httpx.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status}"
    if status == 429 or status >= 500:
        raise JobFailed(str(message), where=str(response.url), remedy="ask again in a while")
    remedy = _REMEDIES.get(status, "ask otherwise")
    raise TitaError(str(message), where=str(response.url), remedy=remedy)
