"""Typos, wrong types and contradictions are told at install time, with their place."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

SERVING = {"inference.enabled": True}
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("a negative number of GPUs", {"jobs.perJob.train-dpo.gpusPerNode": -1}, "gpusPerNode"),
    ("an unknown key", {"gpus": -1}, "gpus"),
    ("an unknown key further down", {"s3.buckt": "x"}, "buckt"),
    ("an unknown key of one job", {"jobs.perJob.train-dpo.gpus": 4}, "gpus"),
    ("an unknown job", {"jobs.perJob.train-dop.nodes": 2}, "choose one of benchmark"),
    ("no bucket", {"s3.bucket": ""}, "bucket"),
    ("an embedded store beside another", {"s3.embedded.enabled": True, "s3.endpoint": "http://x"},
     "endpoint"),
    ("an ingress without a host", {**SERVING, "inference.ingress.enabled": True}, "hosts"),
    ("an ingress host without a name", {"inference.ingress.hosts": [{"paths": []}]}, "host"),
    ("a route without a gateway", {**SERVING, "inference.httpRoute.enabled": True}, "parentRefs"),
    ("scaling by nothing",
     {**SERVING, "inference.autoscaling.enabled": True,
      "inference.autoscaling.targetWaitingRequests": 0}, "autoscaling"),
    ("KEDA without its metric",
     {"inference.autoscaling.enabled": True, "inference.autoscaling.kind": "keda",
      "inference.autoscaling.targetWaitingRequests": 0,
      "inference.autoscaling.targetCPUUtilizationPercentage": 80}, "targetWaitingRequests"),
    ("fewer replicas at most than at least",
     {**SERVING, "inference.autoscaling.minReplicas": 9}, "minReplicas"),
    ("no time left to drain", {**SERVING, "inference.preStopSeconds": 180}, "preStopSeconds"),
    ("two caches", {"jobs.cache.storageClass": "a", "jobs.cache.existingClaim": "b",
                    "jobs.cache.size": "1Gi"}, "existingClaim"),
    ("a claim without a size", {"jobs.scratch.storageClass": "a", "jobs.scratch.size": ""}, "size"),
    ("a quantity in the wrong unit", {"jobs.shmSize": "8GB"}, "shmSize"),
    ("a weight over 1", {"inference.weight": 1.5}, "weight"),
    ("text for a number", {"inference.replicaCount": "two"}, "replicaCount"),
    ("a number for a list", {"jobs.tolerations": 1}, "tolerations"),
    ("a toleration's misspelt key", {"jobs.tolerations": [{"operater": "Exists"}]}, "operater"),
    ("a pull policy in lower case", {"image.pullPolicy": "always"}, "pullPolicy"),
    ("a digest that is none", {"image.digest": "latest"}, "digest"),
    ("a bucket that is a URL", {"s3.bucket": "s3://my-bucket"}, "bucket"),
    ("an endpoint without a scheme", {"s3.endpoint": "s3.example:9000"}, "endpoint"),
    ("root", {"podSecurityContext.runAsUser": 0}, "runAsUser"),
    ("a schedule of four fields", {"jobs.perJob.benchmark.schedule": "0 3 * *"}, "schedule"),
    ("an unknown log level", {"logLevel": "trace"}, "logLevel"),
    ("a spread over no pods", {"jobs.topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]},
     "labelSelector"),
    ("a rule of egress by name", {"networkPolicy.egress": [{"to": [{"host": "s3.example"}]}]},
     "host"),
    ("a model name with a colon", {"inference.modelName": "tita:base"}, "modelName"),
]  # fmt: skip


@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize(
    ("values", "told"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_mistake_is_told(
    chart: SimpleNamespace, values: dict[str, Any], told: str, major: str
) -> None:
    done = chart.template(values, major=major)
    assert done.returncode != 0
    assert done.stdout == ""
    assert told in done.stderr


def objects_of(schema: Any) -> list[dict[str, Any]]:
    """Every schema of an object with named properties, at any depth; not the conditions."""
    if isinstance(schema, list):
        return [found for part in schema for found in objects_of(part)]
    if not isinstance(schema, dict):
        return []
    mine = [schema] if schema.get("type") == "object" and "properties" in schema else []
    parts = [part for key, part in schema.items() if key not in ("if", "then", "else", "anyOf")]
    return mine + objects_of(parts)


def test_the_schema_is_strict(chart: SimpleNamespace) -> None:
    schema = json.loads((chart.path / "values.schema.json").read_text())
    # Kubernetes' own volume, of which only the name is looked at here.
    loose = [o for o in objects_of(schema) if o.get("additionalProperties") is not False]
    assert loose == [schema["definitions"]["volumes"]["items"]]


def test_the_schema_and_the_values_have_the_same_keys(chart: SimpleNamespace) -> None:
    schema = json.loads((chart.path / "values.schema.json").read_text())
    values = yaml.safe_load((chart.path / "values.yaml").read_text())

    def compare(part: Any, schema_part: dict[str, Any], path: str) -> None:
        if "$ref" in schema_part:
            schema_part = schema["definitions"][schema_part["$ref"].rsplit("/", 1)[1]]
        known = schema_part.get("properties")
        if not isinstance(part, dict) or known is None or path in FREE:
            return
        assert set(part) == set(known) - {"global"}, path
        for key, value in part.items():
            compare(value, known[key], f"{path}.{key}".lstrip("."))

    # Whole objects of Kubernetes, of which the values set but some fields.
    FREE = {
        "jobs.resources", "inference.resources", "s3.embedded.resources", "jobs.affinity",
        "inference.affinity", "s3.embedded.affinity", "podSecurityContext", "securityContext",
    }  # fmt: skip
    compare(values, schema, "")
