"""`tita ask`: one question to a server, the answer as it comes."""

import base64
import json
import mimetypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tita.errors import JobFailed, TitaError


def ask(
    question: str,
    *,
    url: str,
    images: Sequence[Path] = (),
    model: str | None = None,
    weight: float | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    api_key: str | None = None,
) -> None:
    """Print the answer on standard output as it streams, and what it cost on standard error.

    Raises:
        TitaError: no such server, or it refused.
    """
    address = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=address, headers=headers, timeout=600) as client:
            body = {
                "model": model or _first_model(client),
                "messages": [{"role": "user", "content": _content(question, images)}],
                "temperature": temperature,
                "stream": True,
                "stream_options": {"include_usage": True},
                "explain": True,
            }
            wanted = {"guidance_weight": weight, "max_tokens": max_tokens}
            body |= {name: value for name, value in wanted.items() if value is not None}
            _show(_events(client, body))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TitaError(
            f"no answer ({error})", where=address, remedy="check --url, and that it runs"
        ) from None


def _content(question: str, images: Sequence[Path]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for path in images:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
    return [*parts, {"type": "text", "text": question}]


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
            sys.stdout.flush()
    console.print()
    print(
        f"{usage.get('completion_tokens', 0)} tokens, {usage.get('changed_tokens', 0)} changed; "
        f"base {usage.get('base_ms', 0):.0f} ms, reward {usage.get('reward_ms', 0):.0f} ms",
        file=sys.stderr,
    )


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    raise TitaError(str(message), where=str(response.url), remedy="see the server's README")
