"""JSON for strict parsers such as jq and JavaScript's: numbers that are not finite are null."""

import json
import math
from functools import cache
from typing import Any


def dump_json(value: Any, **options: Any) -> str:
    """As `json.dumps`, with null for NaN and infinities, which JSON does not have.

    Args:
        value: a value that `json.dumps` takes.
        options: of `json.dumps`.
    """
    encoder = _encoder(**options)
    try:
        return encoder.encode(value)
    except ValueError:  # rare, and a copy of all values takes as long as writing them
        return encoder.encode(_finite(value))


def clean_text(text: str) -> str:
    """Text with surrogate pairs joined and single surrogates replaced, so that it can be encoded.

    Some servers escape the two halves of a character in different events.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@cache
def _encoder(**options: Any) -> json.JSONEncoder:
    """Kept, because `json.dumps` makes one for each call with options."""
    return json.JSONEncoder(allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k) if isinstance(k, float) else k: _finite(v) for k, v in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
