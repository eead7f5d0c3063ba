#!/usr/bin/env python3
"""Write the table of values in the chart's README from the comments in values.yaml.

The comments are helm-docs': `# -- text` above a key, more lines after it, and `# @default -- text`
where the default says too little. `--check` writes nothing and fails if the README is out of date.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).parent / "tita"
BEGIN, END = "<!-- values -->", "<!-- /values -->"

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][\w.-]*):")


class Value(NamedTuple):
    """One documented value."""

    path: str
    default: str
    text: str


def documented(source: str) -> Iterator[Value]:
    """The documented values of a values.yaml, in its order."""
    tree = yaml.safe_load(source)
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in source.splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.removeprefix("#").strip())
            continue
        if match := _KEY.match(line):
            indent = len(match["indent"])
            parents = [parent for parent in parents if parent[0] < indent]
            parents.append((indent, match["key"]))
            path = tuple(key for _, key in parents)
            if any(part.startswith("-- ") for part in comment):
                yield _value(path, comment, _at(tree, path))
        comment = []


def table(values: list[Value]) -> str:
    """A Markdown table for every top-level part of the values."""
    lines: list[str] = []
    part = None
    for value in values:
        top = value.path.split(".")[0] if "." in value.path else ""
        if top != part:
            part = top
            lines += ["", f"### {top}" if top else "### General", ""]
            lines += ["| value | default | what |", "|---|---|---|"]
        lines.append(f"| `{value.path}` | {value.default} | {value.text} |")
    return "\n".join(lines[1:])


def readme(old: str, source: str) -> str:
    """The README with its table made anew."""
    head, _, rest = old.partition(BEGIN)
    _, _, tail = rest.partition(END)
    # General values first, then part by part: a part must not be torn in two.
    values = sorted(documented(source), key=lambda value: "." in value.path)
    return f"{head}{BEGIN}\n\n{table(values)}\n\n{END}{tail}"


def _value(path: tuple[str, ...], comment: list[str], default: Any) -> Value:
    shown = f"`{json.dumps(default)}`"
    words: list[str] = []
    for part in comment:
        if part.startswith("@default -- "):
            shown = part.removeprefix("@default -- ")
        else:
            words.append(part.removeprefix("-- "))
    return Value(".".join(path), shown.replace("|", "\\|"), " ".join(words).replace("|", "\\|"))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def main() -> None:
    """Write the README, or with `--check` say whether it is up to date."""
    file = CHART / "README.md"
    old = file.read_text(encoding="utf-8")
    new = readme(old, (CHART / "values.yaml").read_text(encoding="utf-8"))
    if "--check" not in sys.argv[1:]:
        file.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"{file} is out of date; run `make chart-readme`")


if __name__ == "__main__":
    main()
