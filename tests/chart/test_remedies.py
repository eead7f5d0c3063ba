"""Chart values that the package's messages name exist, with Helm 3 and 4."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.chart.test_docs import help_of

PACKAGE = Path(__file__).parents[2] / "tita"
_RESOURCES = {"jobs.batch", "s3.amazonaws", "image.py"}
"""What looks like a value: names of the Kubernetes API, of hosts and of files."""


def literals(tree: ast.AST) -> Iterator[str]:
    """String literals that are no docstrings; placeholders of f-strings are `*`."""
    parts = {
        id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values
    }
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)
        elif isinstance(text := getattr(node, "value", None), str) and id(node) not in parts | docs:
            yield text


def named_values(sections: list[str]) -> Iterator[tuple[str, str]]:
    """(module, path) of every chart value that a message names."""
    pattern = re.compile(
        rf"(?<![\w./:{{-])((?:{'|'.join(sections)})(?:\.(?:[A-Za-z]+|\*))+)(?![\w/(])"
    )
    for path in sorted(PACKAGE.rglob("*.py")):
        for text in literals(ast.parse(path.read_text())):
            for found in pattern.findall(text):
                if ".".join(found.split(".")[:2]) not in _RESOURCES:
                    yield str(path.relative_to(PACKAGE)), found


def exists(values: Any, schema: dict[str, Any], keys: list[str]) -> bool:
    """Whether the path exists in the defaults, or for one job in the schema."""
    if keys[:2] == ["jobs", "perJob"]:
        return len(keys) < 4 or keys[3] in schema["definitions"]["job"]["properties"]
    for key in keys:
        if key == "*":
            return isinstance(values, dict)
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def test_values_in_messages_exist(chart: SimpleNamespace) -> None:
    values = yaml.safe_load((chart.path / "values.yaml").read_text())
    schema = yaml.safe_load((chart.path / "values.schema.json").read_text())
    sections = [key for key, value in values.items() if isinstance(value, dict)]
    found = list(named_values(sections))
    assert len(found) > 20
    assert [entry for entry in found if not exists(values, schema, entry[1].split("."))] == []


@pytest.mark.parametrize("major", ["3", "4"])
def test_commands_of_kubectl_and_helm_in_messages_exist(chart: SimpleNamespace, major: str) -> None:
    """`{kubectl} VERB ...` and `CommandScope.kubectl(VERB, ...)`, and their options."""
    folder = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir(major)
    found: set[tuple[str, str, str]] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for text in literals(tree):
            for program, command in re.findall(r"\{(kubectl|helm)\} ([^`]+)", text):
                options = re.findall(r"--[a-z][-a-z]+", command)
                found |= {(program, command.split()[0], option) for option in (*options, "")}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr in ("kubectl", "helm"):
                words = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
                options = [word for word in words if word.startswith("--")]
                found |= {(call.func.attr, word, o) for word in words[:1] for o in (*options, "")}
    verbs = {(program, verb) for program, verb, _ in found}
    assert {("kubectl", "scale"), ("kubectl", "patch"), ("helm", "upgrade")} < verbs
    for program, verb, option in sorted(found):
        text = help_of(folder / program, *(["rollout", "resume"] if verb == "rollout" else [verb]))
        assert f"{program} {verb}" in text, (program, verb)
        assert re.search(rf"{option or verb}\b", text), (program, verb, option)


@pytest.mark.parametrize("major", ["3", "4"])
def test_settings_in_messages_render(chart: SimpleNamespace, major: str) -> None:
    """`KEY=VALUE` of a message, such as s3.embedded.persistence.enabled=false."""
    values = yaml.safe_load((chart.path / "values.yaml").read_text())
    sections = [key for key, value in values.items() if isinstance(value, dict)]
    pattern = re.compile(rf"\b(?:{'|'.join(sections)})(?:\.[A-Za-z]+)+=[-A-Za-z0-9]+")
    files = [*PACKAGE.rglob("*.py"), *(chart.path / "templates").rglob("*")]
    texts = [path.read_text() for path in files if path.is_file()]
    settings = sorted({found for text in texts for found in pattern.findall(text)})
    assert len(settings) > 4
    for setting in settings:
        done = chart.run_helm(
            "template", "tita", str(chart.path), "--set=s3.bucket=my-bucket", f"--set={setting}",
            major=major,
        )  # fmt: skip
        assert done.returncode == 0, f"{setting}: {done.stderr}"
