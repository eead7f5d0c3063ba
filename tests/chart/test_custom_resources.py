"""Custom resources are strictly valid by the schemas of their CustomResourceDefinitions.

`custom_resources.json` holds the schema of each kind, extracted from the CRD at `source` with that
`sha256`, without descriptions, CEL rules and schemas of pod templates, under the licence of that
project. Documents show some kinds that the chart does not render.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from tests.chart.test_rendering import CUSTOM

DEFINITIONS = json.loads(Path(__file__).with_name("custom_resources.json").read_text())
KEDA = {"inference.autoscaling.kind": "keda"}


def strict(schema: Any) -> Any:
    """Return the schema with unknown keys rejected, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def validate(o: dict[str, Any]) -> None:
    definition = DEFINITIONS[o["kind"]]
    assert o["apiVersion"] == definition["apiVersion"]
    jsonschema.validate(o, strict(definition["schema"]))


@pytest.fixture
def customs(chart: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """One object per kind."""
    rendered = chart.render(KEDA, files=("full",))
    return {o["kind"]: o for o in rendered if o["kind"] in CUSTOM}


def test_every_custom_resource_is_valid(customs: dict[str, dict[str, Any]]) -> None:
    assert customs.keys() == CUSTOM
    for o in customs.values():
        validate(o)


@pytest.mark.parametrize("kind", sorted(CUSTOM))
def test_an_unknown_field_is_rejected(customs: dict[str, dict[str, Any]], kind: str) -> None:
    customs[kind]["spec"]["unknown"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        validate(customs[kind])
