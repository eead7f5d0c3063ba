"""Values of single cells: missing ones, numbers, and lists and objects that stand in texts."""

import ast
import io
import json
import math
import re
import tokenize
import unicodedata
from collections.abc import Mapping
from typing import Any


def parse_structure(value: Any) -> Any:
    """A text that is a JSON or Python list of texts or objects, or an object, as that value.

    Any other value is returned unchanged, so that `[12, 40]` or `[unclear]` remain texts.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{", "("):
        return value
    text = value.strip()
    if text.startswith("("):  # a tuple in a cell that Python wrote, or a text such as "(a)"
        parsed = parse_python(text)
        is_tuple = isinstance(parsed, tuple) and all(isinstance(part, str) for part in parsed)
        return list(parsed) if is_tuple else value
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = parse_python(text)
    if isinstance(parsed, Mapping):
        return parsed
    if isinstance(parsed, list | tuple) and all(
        part is None or isinstance(part, str | Mapping | list) for part in parsed
    ):
        return list(parsed)
    return value


def parse_python(text: str) -> Any:
    """A literal of Python; None for anything else, and for NumPy's lists without commas."""
    try:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kinds = [token.type for token in tokens if token.type != tokenize.NL]
        # Python joins adjacent texts: "['a' 'b']", as NumPy prints an array, would be ['ab'].
        if any(kinds[n] == kinds[n + 1] == tokenize.STRING for n in range(len(kinds) - 1)):
            return None
        return ast.literal_eval(text)
    # `{{1}}`, a set of sets, is a TypeError.
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
        return None


def looks_like_list(text: str) -> bool:
    """Whether a text was probably a list before it became text."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return stripped.startswith("{") and stripped.endswith("}")
    inner = stripped[1:-1].strip()
    return not inner or inner[0] in "'\"[{" or bool(re.fullmatch(r"[-\d.,\s]+", inner))


def is_missing(value: Any) -> bool:
    """Whether a value is null, or NaN, which pandas writes for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a value is missing, or a text, list or object with nothing in it."""
    if is_missing(value):
        return True
    if isinstance(value, str):
        return value in ("", "[]", "{}")
    return isinstance(value, bytes | list | tuple | Mapping) and not value


def number_text(value: float) -> str:
    """A number as text; 3.0 is 3."""
    return str(int(value)) if value.is_integer() else str(value)


def is_visible(char: str) -> bool:
    """Whether a character is neither a space nor a control character without a width."""
    return not char.isspace() and unicodedata.category(char) != "Cf"


def is_blank(value: Any) -> bool:
    """Whether a value is a text of spaces only."""
    return isinstance(value, str) and not value.strip()
