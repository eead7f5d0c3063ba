"""Seeded requests to every path of a server: valid bodies with a few mutations, and broken ones."""

import base64
import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from serve_process import about, picture

_TEXT = "user: is there a 7 ? assistant:"
_PICTURE = picture("red", size=24)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tita", "messages": about(_PICTURE, "what color ?"), "max_tokens": 3,
        "temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["zz"], "n": 2,
        "stream": True, "stream_options": {"include_usage": True}, "min_tokens": 1,
        "logprobs": True, "top_logprobs": 2, "explain": True, "ignore_eos": True,
        "guidance_weight": 0.4, "guidance_form": "genarm", "guidance_plausibility": 0.1,
        "repetition_penalty": 1.1, "tools": [], "user": "u",
    },
    "/v1/completions": {
        "model": "tita", "prompt": [_TEXT, "what"], "max_tokens": 3, "temperature": 1.0,
        "logprobs": 1, "stream": False, "seed": 2, "stop": "zz", "min_tokens": 1, "n": 1,
        "guidance_weight": 0.4,
    },
    "/worker_generate_stream": {
        "model": "tita", "prompt": f"<image> {_TEXT}", "temperature": "0.7", "top_p": 0.9,
        "images": [base64.b64encode(_PICTURE).decode()], "max_new_tokens": 3, "stop": "###",
        "guidance_form": "tita",
    },
    "/tokenize": {"prompt": _TEXT, "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"model": "tita", "tokens": [1, 5, 9]},
    "/get_worker_address": {"model": "tita"},
    "/list_models": {},
    "/refresh_all_workers": {},
    "/worker_get_status": {},
}  # fmt: skip
"""A body for each path that takes one."""
GET_PATHS = (
    "/v1/models", "/v1/models/tita", "/v1/models/none", "/v1/models/%00", "/healthz", "/health",
    "/readyz", "/metrics", "/openapi.json", "/", "/static/page.js", "/static/../app.py",
    "/nowhere", "//",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.0, 0.5, -0.0, 1e308, 1e-60, 10**20, -(2**63), 5.5, "", " ",
    "\n\t", "5", "no", "tita", "tita:base", "\ud800", "\u0000", "\U0001f600", "\ufffd", "<image>",
    "</s>", "data:,", "data:image/png;base64,AAAA", "http://127.0.0.1/", "x" * 3000, "what " * 300,
    [], {}, [[]], [None], [""], [0], [10**9], [1, "a"], {"a": {"b": []}}, [[1, 2], [3]],
    [{"role": "user", "content": " "}], [{"type": "text", "text": ""}], {"type": "json_object"},
)  # fmt: skip
_NAMES = (
    "max_tokens", "temprature", "guidanceWeight", "chat_template_kwargs", "extra_body", "echo", "x",
    "\r\nset-cookie: a", "prompt", "messages", "stop_token_ids", "best_of", "__class__", "",
)  # fmt: skip
_TYPES = ("application/json", "text/plain", "application/x-www-form-urlencoded", "", "\u00fc/json")


@dataclass(frozen=True)
class Mutant:
    """One request."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hangs_up: bool = False
    """The client closes the connection without reading."""


def mutants(num_requests: int, *, seed: int) -> Iterator[Mutant]:
    """Requests that a seed determines; the paths take turns."""
    chance = random.Random(seed)
    paths = [*VALID] * 2 + [*GET_PATHS]
    for number in range(num_requests):
        path = paths[number % len(paths)]
        if path in VALID:
            yield _with_body(path, chance)
        else:
            method = chance.choice(("GET", "GET", "HEAD", "DELETE", "PUT", "OPTIONS"))
            query = chance.choice(("", "", "?a=b", "?%00=%ff", "?" + "q" * 500))
            yield Mutant(method, path + query)


def _with_body(path: str, chance: random.Random) -> Mutant:
    given: Any = copy.deepcopy(VALID[path])
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        _mutate(given, chance)
    if chance.random() < 0.03:
        given = _value(chance)
    content = json.dumps(given).encode()
    kind = _TYPES[0] if chance.random() < 0.97 else chance.choice(_TYPES)
    if chance.random() < 0.06:
        content = _broken(content, chance)
    headers = {"content-type": kind} | (
        {"x-request-id": "\u00e9" * 200} if chance.random() < 0.02 else {}
    )
    method = "POST" if chance.random() < 0.98 else chance.choice(("GET", "PUT", "PATCH"))
    return Mutant(method, path, content, headers, hangs_up=chance.random() < 0.04)


def _mutate(body: dict[str, Any], chance: random.Random) -> None:
    """Replace, delete or add one value somewhere in the body."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(body)
    what = chance.random()
    if what < 0.15 or not places:
        body[chance.choice(_NAMES)] = _value(chance)
        return
    owner, key = chance.choice(places)
    if what < 0.3 and isinstance(owner, dict):
        del owner[key]
    elif what < 0.4 and isinstance(owner, list):
        owner.extend(copy.deepcopy(owner) * chance.choice((1, 9)))
    else:
        owner[key] = _value(chance)


def _value(chance: random.Random) -> Any:
    """One of `_VALUES`; later mutations change the copy only."""
    return copy.deepcopy(chance.choice(_VALUES))


def _broken(content: bytes, chance: random.Random) -> bytes:
    """A body that is probably no JSON, or another number than `json.dumps` writes."""
    at = chance.randrange(len(content) + 1)
    return chance.choice((
        content[:at],
        content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
        content * 2,
        b"[" * 5000,
        content.replace(b"1.0", b"1e999"),
        content.replace(b": 3", b": " + b"9" * 5000),
        content.replace(b": 3", b": NaN"),
    ))  # fmt: skip
