"""Where recipes come from: YAML files, `--set` options and the variable `TITA_RECIPE`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tita.errors import TitaError
from tita.jobspec import merge


class _RecipeLoader(yaml.SafeLoader):
    """Reads plain scalars by the core schema of YAML 1.2, without octal and hexadecimal numbers.

    PyYAML implements YAML 1.1, where 010 is 8, `off` is false, 1:30 is 90 and 2e-6 is text.
    https://yaml.org/spec/1.2.2/#103-core-schema
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN", "-+."),
):
    _RecipeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})\Z"), [*_first, ""]
    )


def parse_recipe_variable(text: str | None) -> dict[str, Any]:
    """The JSON object in `TITA_RECIPE`, not validated; empty if the variable is not set."""
    if not text:
        return {}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise TitaError(f"not JSON ({error})", where="TITA_RECIPE") from None
    if not isinstance(values, dict):
        raise TitaError("not a JSON object", where="TITA_RECIPE")
    return values


def read_recipe_file(file: Path | None) -> dict[str, Any]:
    """The keys of a YAML recipe file, not validated; empty without a file."""
    if file is None:
        return {}
    try:
        values = yaml.load(file.read_bytes(), _RecipeLoader)  # YAML may be in UTF-16
    except yaml.YAMLError as error:
        raise TitaError(
            f"not YAML ({error})", where=str(file), remedy="write lines such as beta: 0.2"
        ) from None
    if values is not None and not isinstance(values, dict):
        raise TitaError("a recipe is a mapping of keys to values", where=str(file))
    return values or {}


def parse_overrides(options: Sequence[str]) -> dict[str, Any]:
    """The keys of `--set` options, not validated: `key=value` each, dots for nested keys.

    A value that starts with a quote, `[` or `{` is YAML; any other is one scalar, taken whole.
    """
    values: dict[str, Any] = {}
    for text in options:
        key, equals, raw = text.partition("=")
        if not (key and equals):
            raise TitaError(
                f"{text!r} is not key=value", where="--set", remedy="write --set beta=0.2"
            )
        value = _parse_value(key, raw)
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def format_overrides(values: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """The `key=value` texts that `parse_overrides` reads as `values`."""
    found = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found += format_overrides(value, prefix=f"{key}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, str) and (text[:1] in _YAML or _parse_value(key, text) != value):
            text = json.dumps(value)
        found.append(f"{key}={text}")
    return found


_YAML = ("'", '"', "[", "{")


def _parse_value(key: str, raw: str) -> Any:
    raw = raw.strip()
    if not raw.startswith(_YAML):
        loader = _RecipeLoader("")
        tag = loader.resolve(yaml.ScalarNode, raw, (True, False))  # type: ignore[no-untyped-call]
        return loader.construct_object(yaml.ScalarNode(tag, raw))
    try:
        return yaml.load(raw, _RecipeLoader)
    except yaml.YAMLError:
        raise TitaError(
            f"{raw!r} is not valid YAML",
            where=f"--set {key}",
            remedy=f"close its brackets and quotes, or quote text: --set {key}='\"...\"'",
        ) from None
