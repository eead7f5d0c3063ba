"""values.schema.json rejects typos, wrong types and contradictions, and names the value."""

import json
from types import SimpleNamespace
from typing import Any

import jsonschema
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
    ("an embedded store and an endpoint", {"s3.embedded.enabled": True, "s3.endpoint": "http://x"},
     "endpoint"),
    ("an ingress without a host", {**SERVING, "inference.ingress.enabled": True}, "hosts"),
    ("an ingress host without a name", {"inference.ingress.hosts": [{"paths": []}]}, "host"),
    ("a route without a gateway", {**SERVING, "inference.httpRoute.enabled": True}, "parentRefs"),
    ("autoscaling without a metric",
     {**SERVING, "inference.autoscaling.enabled": True,
      "inference.autoscaling.targetWaitingRequests": 0}, "autoscaling"),
    ("KEDA without its metric",
     {"inference.autoscaling.enabled": True, "inference.autoscaling.kind": "keda",
      "inference.autoscaling.targetWaitingRequests": 0,
      "inference.autoscaling.targetCPUUtilizationPercentage": 80}, "targetWaitingRequests"),
    ("more minimum than maximum replicas",
     {**SERVING, "inference.autoscaling.minReplicas": 9}, "minReplicas"),
    ("no time left to drain", {**SERVING, "inference.preStopSeconds": 180}, "preStopSeconds"),
    ("two caches", {"jobs.cache.storageClass": "a", "jobs.cache.existingClaim": "b",
                    "jobs.cache.size": "1Gi"}, "existingClaim"),
    ("a claim without a size", {"jobs.scratch.storageClass": "a", "jobs.scratch.size": ""}, "size"),
    ("a quantity in the wrong unit", {"jobs.shmSize": "8GB"}, "shmSize"),
    ("a weight over 1", {"inference.weight": 1.5}, "weight"),
    ("an unknown guidance form", {"inference.form": "titan"}, "form"),
    ("the form dpo without a reference model", {"inference.form": "dpo"}, "reference"),
    ("a reference model without a reward model",
     {"inference.reference": "reward/start", "inference.reward": ""}, "reward"),
    ("a plausibility over 1", {"inference.plausibility": 10}, "plausibility"),
    ("an unknown dtype", {"inference.dtype": "fp8"}, "dtype"),
    ("a batch of zero", {"inference.maxBatch": 0}, "maxBatch"),
    ("a string for a number", {"inference.replicaCount": "two"}, "replicaCount"),
    ("a number for a list", {"jobs.tolerations": 1}, "tolerations"),
    ("a misspelt key of a toleration", {"jobs.tolerations": [{"operater": "Exists"}]}, "operater"),
    ("a pull policy in lower case", {"image.pullPolicy": "always"}, "pullPolicy"),
    ("a digest that is a tag", {"image.digest": "latest"}, "digest"),
    ("a bucket that is a URL", {"s3.bucket": "s3://my-bucket"}, "bucket"),
    ("an endpoint without a scheme", {"s3.endpoint": "s3.example:9000"}, "endpoint"),
    ("root", {"podSecurityContext.runAsUser": 0}, "runAsUser"),
    ("a schedule of four fields", {"jobs.perJob.benchmark.schedule": "0 3 * *"}, "schedule"),
    ("an unknown log level", {"logLevel": "trace"}, "logLevel"),
    ("a topology spread without a selector", {"jobs.topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]},
     "labelSelector"),
    ("an egress rule by host name", {"networkPolicy.egress": [{"to": [{"host": "s3.example"}]}]},
     "host"),
    ("a model name with a colon", {"inference.modelName": "tita:base"}, "modelName"),
]  # fmt: skip


@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize(
    ("values", "named"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_helm_rejects_a_mistake_and_names_the_value(
    chart: SimpleNamespace, values: dict[str, Any], named: str, major: str
) -> None:
    done = chart.template(values, major=major)
    assert done.returncode != 0
    assert done.stdout == ""
    assert named in done.stderr


@pytest.fixture
def schema(chart: SimpleNamespace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((chart.path / "values.schema.json").read_text())
    return found


@pytest.fixture
def values(chart: SimpleNamespace) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((chart.path / "values.yaml").read_text())
    return found


def objects_of(schema: Any) -> list[dict[str, Any]]:
    """Every object schema with named properties, at any depth, without conditions."""
    if isinstance(schema, list):
        return [found for part in schema for found in objects_of(part)]
    if not isinstance(schema, dict):
        return []
    mine = [schema] if schema.get("type") == "object" and "properties" in schema else []
    parts = [part for key, part in schema.items() if key not in ("if", "then", "else", "anyOf")]
    return mine + objects_of(parts)


def test_the_schema_is_strict(schema: dict[str, Any]) -> None:
    # Of a volume only the name is checked.
    loose = [o for o in objects_of(schema) if o.get("additionalProperties") is not False]
    assert loose == [schema["definitions"]["volumes"]["items"]]


def test_the_defaults_are_valid(schema: dict[str, Any], values: dict[str, Any]) -> None:
    values["s3"]["bucket"] = "my-bucket"  # the one required value
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema, cls=jsonschema.Draft7Validator)


def test_per_job_values_are_those_of_jobs_and_of_the_job_file(schema: dict[str, Any]) -> None:
    shared = set(schema["properties"]["jobs"]["properties"]) - {"perJob"}
    per_job = schema["definitions"]["job"]["properties"]
    for key in shared:
        assert per_job[key] == {"$ref": f"#/properties/jobs/properties/{key}"}
    assert set(per_job) - shared == {
        "nodes", "gpusPerNode", "schedule", "backoffLimit", "activeDeadlineSeconds", "recipe",
    }  # fmt: skip


def test_the_schema_and_the_values_have_the_same_keys(
    schema: dict[str, Any], values: dict[str, Any]
) -> None:
    def compare(part: Any, schema_part: dict[str, Any], path: str) -> None:
        if "$ref" in schema_part:
            schema_part = schema["definitions"][schema_part["$ref"].rsplit("/", 1)[1]]
        known = schema_part.get("properties")
        if not isinstance(part, dict) or known is None or path in FREE:
            return
        assert set(part) == set(known) - {"global"}, path
        for key, value in part.items():
            compare(value, known[key], f"{path}.{key}".lstrip("."))

    # Objects of the Kubernetes API, of which values.yaml sets only some fields.
    FREE = {
        "jobs.resources", "inference.resources", "s3.embedded.resources", "jobs.affinity",
        "inference.affinity", "s3.embedded.affinity", "podSecurityContext", "securityContext",
    }  # fmt: skip
    compare(values, schema, "")
