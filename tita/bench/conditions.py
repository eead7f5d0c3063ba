"""The conditions of a run: endpoint, load, client, machine and command, without secrets."""

import json
import os
import platform
import re
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tita

_SECRET = re.compile(r"key|token$|secret|passw|authori[sz]ation|credential|bearer", re.IGNORECASE)
_NO_SECRET = frozenset(("key-file", "key_file", "key_env"))
_MASK = "***"


def run_conditions(
    *, endpoint: str, load: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The conditions of a run that starts now.

    Args:
        endpoint: base URL, or another name of what answers.
        load: how requests are sent; runs with other values have times that are not comparable.
        options: other options of the client, such as its timeout.
    """
    return {
        "session": uuid.uuid4().hex[:12],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "endpoint": mask_url(endpoint),
        "load": {name: value for name, value in load.items() if value is not None},
        "options": {name: value for name, value in (options or {}).items() if value is not None},
        "client": {
            "tita": tita.__version__,
            "python": platform.python_version(),
            "httpx": version("httpx"),
        },
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
        },
        "command": masked_command(sys.argv),
    }


def load_title(conditions: Mapping[str, Any] | None) -> str:
    """The load in words, such as `concurrency 8`; empty if it was not recorded."""
    load = (conditions or {}).get("load")
    if not load:
        return ""
    if "batch_size" in load:
        return f"batch size {load['batch_size']}"
    title = f"concurrency {load.get('concurrency', '?')}"
    if "rate" in load:
        title = f"{load['rate']:g} requests/s, {load.get('arrivals', 'constant')}, {title}"
    return title


def masked_command(arguments: Sequence[str]) -> str:
    """A command line for a shell, without the values of options that hold secrets."""
    if not arguments:
        return ""
    words, hide_next = [Path(arguments[0]).name], False
    for word in arguments[1:]:
        name, sign, value = word.partition("=")
        is_option = word.startswith("--")
        if hide_next:
            words.append(_MASK)
        elif "://" in name:
            words.append(mask_url(word))
        elif sign and _is_secret(name.lstrip("-")):
            words.append(f"{name}={_MASK}")
        else:
            words.append(f"{name}={_masked_value(value)}" if sign else word)
        hide_next = is_option and not sign and _is_secret(name.lstrip("-"))
    return shlex.join(words).replace(f"'{_MASK}'", _MASK)


def _masked_value(text: str) -> str:
    if "://" in text:
        return mask_url(text)
    try:
        fields = json.loads(text)
    except ValueError:
        return text
    return json.dumps(mask_secrets(fields)) if isinstance(fields, dict | list) else text


def mask_url(url: str) -> str:
    """A URL without the user's name, password and query, which may hold a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return _MASK
    if not parts.scheme or not parts.netloc:
        return url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query=_MASK if parts.query else "").geturl()


def mask_secrets(value: Any) -> Any:
    """JSON data without the values of fields that are named like secrets."""
    if isinstance(value, Mapping):
        return {
            name: _MASK if _is_secret(str(name)) else mask_secrets(inner)
            for name, inner in value.items()
        }
    return [mask_secrets(inner) for inner in value] if isinstance(value, list) else value


def _is_secret(name: str) -> bool:
    return name not in _NO_SECRET and bool(_SECRET.search(name))
