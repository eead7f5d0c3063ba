"""The client behind `tita ask`: sends one question to a server and prints the streamed answer."""

import base64
import json
import mimetypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import httpx
from httpx_sse import SSEError, connect_sse
from rich.console import Console
from rich.text import Text

from tita.errors import JobFailed, TitaError
from tita.proxies import without_proxy
from tita.terminal import counted


def ask(
    question: str,
    *,
    url: str,
    images: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> None:
    """Print the answer on standard output as it streams, and its cost on standard error.

    Args:
        url: base URL of the server, with or without `/v1`.
        images: paths, or URLs that the server fetches.
        fields: further fields of the request; those that are None are not sent.

    Raises:
        TitaError: the server cannot be reached, a file cannot be read, or the server returned an
            error (`JobFailed` if a later attempt may succeed).
    """
    address = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(
            base_url=address, headers=headers, timeout=600, mounts=without_proxy(address)
        ) as client:
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": _image_url(image)}} for image in images
            ]
            content.append({"type": "text", "text": question})
            body = {
                "messages": [{"role": "user", "content": content}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "explain": True,
            }
            body |= {name: value for name, value in (fields or {}).items() if value is not None}
            if "model" not in body:
                models = client.get("/v1/models")
                _check_status(models)
                body["model"] = models.json()["data"][0]["id"]
            _print_answer(_stream(client, body))
    except (ValueError, KeyError, IndexError, TypeError, SSEError):
        raise TitaError(
            "the server does not speak OpenAI's API", where=address, remedy="check --url"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise TitaError(
            f"no answer ({reason})",
            where=address,
            remedy="check --url and that the server is running",
        ) from None


def _image_url(image: str) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    media_type = mimetypes.guess_type(image)[0] or "application/octet-stream"
    data = base64.b64encode(Path(image).expanduser().read_bytes()).decode()
    return f"data:{media_type};base64,{data}"


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with connect_sse(client, "POST", "/v1/chat/completions", json=body) as source:
        _check_status(source.response)
        # httpx-sse requires this type; some servers stream events with another one.
        kind = source.response.headers.get("content-type", "")
        source.response.headers["content-type"] = "text/event-stream"
        has_event = False
        for event in source.iter_sse():
            has_event = True
            if event.data == "[DONE]":
                return
            yield json.loads(event.data)
    if not has_event and not kind.startswith("text/event-stream"):
        raise SSEError(f"{kind!r} is no stream of events")
    raise JobFailed("the stream ended early", where=str(client.base_url), remedy="try again")


def _print_answer(chunks: Iterator[dict[str, Any]]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    usage: dict[str, Any] = {}
    for chunk in chunks:
        if "error" in chunk:
            raise JobFailed(chunk["error"]["message"], remedy="try again")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            changed = any(token["changed"] for token in choice.get("explain") or [])
            text = choice["delta"].get("content") or ""
            console.print(Text(text, style="bold green" if changed else ""), end="")
    console.print()
    if "completion_tokens" not in usage:  # other servers may not report it
        return
    cost = counted(usage["completion_tokens"], "token")
    if "changed_tokens" in usage:  # other servers do not have the extensions of tita
        cost += (
            f", {usage['changed_tokens']} changed; "
            f"base {usage['base_ms']:.0f} ms, reward {usage['reward_ms']:.0f} ms"
        )
    print(cost, file=sys.stderr)


_KEY_REMEDY = "give --api-key or set TITA_API_KEY"
_REMEDIES = {401: _KEY_REMEDY, 403: _KEY_REMEDY, 404: "change --model or --url"}


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    response.read()
    if response.has_redirect_location:
        raise TitaError(
            f"the server has another address, {response.headers['location']}",
            where=str(response.url),
            remedy="change --url",
        )
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        body = shorten(response.text, 200, placeholder=" ...")
        message = f"HTTP {status}: {body}" if body else f"HTTP {status}"
    if key := response.request.headers.get("authorization", "").removeprefix("Bearer "):
        message = message.replace(key, "***")  # some servers repeat it
    if status == 429 or status >= 500:
        raise JobFailed(message, where=str(response.url), remedy="try again later")
    remedy = _REMEDIES.get(status, "change the request")
    raise TitaError(message, where=str(response.url), remedy=remedy)
