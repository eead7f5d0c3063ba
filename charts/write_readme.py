#!/usr/bin/env python3
"""Write the tables of values in the chart's README from the comments in values.yaml.

The comments are in helm-docs' format: `# -- description` above a key, continued on the lines below,
and `# @default -- text` where the default alone does not say enough. With `--check` the script
writes nothing and fails if the README is out of date.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

CHART = Path(__file__).parent / "tita"
BEGIN, END = "<!-- values -->", "<!-- /values -->"


class Value(NamedTuple):
    """A documented value: its path, and its default and description in Markdown."""

    path: str
    default: str
    description: str


def documented_values(source: str) -> Iterator[Value]:
    """Yield the documented values of a values.yaml, in file order."""
    lines = source.splitlines()

    def walk(mapping: yaml.MappingNode, prefix: str) -> Iterator[Value]:
        for key, value in mapping.value:
            comment: list[str] = []
            line = key.start_mark.line - 1
            while line >= 0 and lines[line].lstrip().startswith("#"):
                comment.insert(0, lines[line].lstrip("# "))
                line -= 1
            if any(text.startswith("-- ") for text in comment):
                default = yaml.safe_load(yaml.serialize(value))
                yield _value(prefix + key.value, comment, default)
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{prefix}{key.value}.")

    root = yaml.compose(source)
    assert isinstance(root, yaml.MappingNode)
    yield from walk(root, "")


def _value(path: str, comment: list[str], default: object) -> Value:
    shown = f"`{json.dumps(default)}`"
    description: list[str] = []
    for text in comment:
        if text.startswith("@default -- "):
            shown = text.removeprefix("@default -- ")
        else:
            description.append(text.removeprefix("-- "))
    return Value(path, shown.replace("|", "\\|"), " ".join(description).replace("|", "\\|"))


def render(readme: str, source: str) -> str:
    """Return the README with one table per top-level key of the values."""
    sections: dict[str, list[str]] = {"General": []}
    for path, default, description in documented_values(source):
        section = path.split(".")[0] if "." in path else "General"
        row = f"| `{path}` | {default} | {description} |"
        sections.setdefault(section, []).append(row)
    header = "| Value | Default | Description |\n|---|---|---|\n"
    tables = [f"### {name}\n\n{header}" + "\n".join(rows) for name, rows in sections.items()]
    head, _, rest = readme.partition(BEGIN)
    tail = rest.partition(END)[2]
    return "\n\n".join([f"{head}{BEGIN}", *tables, f"{END}{tail}"])


def main() -> None:
    """Write the README, or with `--check` fail if it is out of date."""
    file = CHART / "README.md"
    old = file.read_text(encoding="utf-8")
    new = render(old, (CHART / "values.yaml").read_text(encoding="utf-8"))
    if "--check" not in sys.argv[1:]:
        file.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"{file} is out of date; run `make chart-readme`")


if __name__ == "__main__":
    main()
