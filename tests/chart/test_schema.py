"""values.schema.json rejects typos, wrong types and contradictions, and names the value."""

import json
import re
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from tests.chart.test_rendering import CUSTOM
from tests.chart.values.case import env, server, worker
from tita.cli.commands import app
from tita.errors import TitaError
from tita.recipes import RECIPES, load_recipe

SERVING = {"inference.enabled": True}
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("a negative number of GPUs", {"jobs.perJob.train-dpo.gpusPerNode": -1}, "gpusPerNode"),
    ("an unknown key", {"gpus": -1}, "gpus"),
    ("an unknown key further down", {"s3.buckt": "x"}, "buckt"),
    ("an unknown key of one job", {"jobs.perJob.train-dpo.gpus": 4}, "gpus"),
    ("an unknown job", {"jobs.perJob.train-dop.nodes": 2}, "choose one of benchmark"),
    ("several nodes of a job that runs on one", {"jobs.perJob.benchmark.nodes": 2},
     "jobs.perJob.benchmark.nodes: this job runs on one node"),
    ("no bucket", {"s3.bucket": ""},
     "name the bucket of the store, or run one in the cluster for a trial with s3.embedded.enab"),
    ("an embedded store and an endpoint", {"s3.embedded.enabled": True, "s3.endpoint": "http://x"},
     "endpoint"),
    ("a KMS key without a KMS", {"s3.encryption": "AES256", "s3.kmsKeyId": "alias/x"}, "kmsKeyId"),
    ("an embedded store and a KMS", {"s3.embedded.enabled": True, "s3.encryption": "aws:kms"},
     "s3.encryption"),
    ("an unknown encryption", {"s3.encryption": "aes256"}, "encryption"),
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
    ("a weight over 100", {"inference.weight": 100.5}, "weight"),
    ("a weight of no reward model", {"inference.weights.brief": 0.5}, "rewards.brief"),
    ("an unknown guidance form", {"inference.form": "titan"}, "form"),
    ("the form dpo without a reference model", {"inference.form": "dpo"}, "reference"),
    ("a reference model without a reward model",
     {"inference.reference": "reward/start", "inference.reward": ""}, "reward"),
    ("a plausibility over 1", {"inference.plausibility": 10}, "plausibility"),
    ("an unknown dtype", {"inference.dtype": "fp8"}, "dtype"),
    ("an unknown engine", {"inference.engine": "sglang"}, "engine"),
    ("options of vLLM for another engine", {"inference.vllm.tensorParallelSize": 2}, "engine=vllm"),
    ("more GPUs than vLLM uses", {"inference.engine": "vllm", "inference.gpus": 8},
     "inference.gpus: 8, but vLLM uses 1"),
    ("more than all memory", {"inference.vllm.gpuMemoryUtilization": 90}, "gpuMemoryUtilization"),
    ("a batch of zero", {"inference.maxBatch": 0}, "maxBatch"),
    ("a string for a number", {"inference.replicaCount": "two"}, "replicaCount"),
    ("a number for a list", {"jobs.tolerations": 1}, "tolerations"),
    ("a misspelt key of a toleration", {"jobs.tolerations": [{"operater": "Exists"}]}, "operater"),
    ("a pull policy in lower case", {"image.pullPolicy": "always"}, "pullPolicy"),
    ("a digest that is a tag", {"image.digest": "latest"}, "digest"),
    ("a repository with a tag", {"image.repository": "registry.example/tita:1.2"}, "repository"),
    ("a repository with a digest", {"s3.embedded.image.repository": f"weed@sha256:{'0' * 64}"},
     "repository"),
    ("a registry that is a URL", {"image.registry": "https://registry.example"}, "registry"),
    ("a registry with a slash", {"image.registry": "registry.example/"}, "registry"),
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
    ("a label of the chart", {"commonLabels": {"app.kubernetes.io/version": "2"}},
     "commonLabels: the chart sets app.kubernetes.io/version; remove it"),
    ("a label that pods are selected by", {"inference.podLabels": {"app.kubernetes.io/name": "x"}},
     "inference.podLabels: the chart sets app.kubernetes.io/name; remove it"),
    ("a label that the launcher reads",
     {"jobs.perJob.train-dpo.podLabels": {"tita.dev/job": "x"}},
     "jobs (for train-dpo).podLabels: the chart sets tita.dev/job; remove it"),
    ("two queues", {"jobs.kueue.queueName": "a", "jobs.labels": {"kueue.x-k8s.io/queue-name": "b"}},
     "kueue.queueName sets kueue.x-k8s.io/queue-name; remove one of them"),
    ("GPUs among the resources of inference",
     {"inference.resources": {"limits": {"nvidia.com/gpu": 4}}},
     "inference.resources.limits: nvidia.com/gpu is set by inference.gpus; remove it"),
    ("GPUs among the resources of jobs",
     {"gpuResourceName": "amd.com/gpu", "jobs.resources": {"requests": {"amd.com/gpu": "4"}}},
     "resources.requests: amd.com/gpu is set by jobs.perJob.benchmark.gpusPerNode; remove it"),
    ("an update that replaces no pod", {"inference.strategy.rollingUpdate.maxSurge": 0},
     "inference.strategy.rollingUpdate: no pod may be replaced; set maxSurge or maxUnavailable"),
    ("a schedule of a benchmark without an endpoint",
     {"jobs.perJob.benchmark.schedule": "0 5 * * *"},
     "jobs.perJob.benchmark.schedule: there is no endpoint to benchmark; set inference.enabled"),
    ("experiment trackers of a job that uses none",
     {"jobs.perJob.build-pairs.trackers.existingSecret": "keys"},
     "jobs.perJob.build-pairs.trackers: has no effect"),
    ("a target of KEDA that only the HPA has",
     {"inference.autoscaling.enabled": True, "inference.autoscaling.kind": "keda",
      "inference.autoscaling.targetCPUUtilizationPercentage": 80},
     "inference.autoscaling.targetCPUUtilizationPercentage: has no effect with KEDA"),
    ("a queue among the labels of every object",
     {"jobs.kueue.queueName": "a", "commonLabels": {"kueue.x-k8s.io/queue-name": "b"}},
     "commonLabels: kueue.queueName sets kueue.x-k8s.io/queue-name; remove one of them"),
    ("a variable that follows from the recipe",
     {"jobs.extraEnv": [{"name": "TITA_RECIPE", "value": "{}"}]},
     "jobs (for benchmark).extraEnv: TITA_RECIPE is set by jobs.perJob.benchmark.recipe; remove"),
    ("a variable that follows from the shape of one job",
     {"jobs.perJob.train-dpo.extraEnv": [{"name": "TITA_GPUS", "value": "2"}]},
     "jobs (for train-dpo).extraEnv: TITA_GPUS is set by jobs.perJob.train-dpo.gpusPerNode"),
    ("a variable that every run has", {"jobs.extraEnv": [{"name": "TITA_RUN", "value": "x"}]},
     "extraEnv: TITA_RUN is set by each run; remove it"),
    ("a variable that follows from the GPUs",
     {"inference.extraEnv": [{"name": "TITA_GPUS", "value": "2"}]},
     "inference.extraEnv: TITA_GPUS is set by inference.gpus; remove it"),
    ("RDMA devices among the resources of jobs",
     {"jobs.rdma.enabled": True, "jobs.resources.limits": {"rdma/hca_shared_devices_a": 2}},
     "resources.limits: rdma/hca_shared_devices_a is set by jobs.rdma.count; remove it"),
    ("a negative quantity", {"jobs.resources.requests": {"cpu": -0.5}}, "cpu"),
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


CONTRADICTIONS = [
    "no bucket", "an embedded store and an endpoint", "an ingress without a host",
    "a KMS key without a KMS", "an embedded store and a KMS",
    "a route without a gateway", "autoscaling without a metric", "KEDA without its metric",
    "more minimum than maximum replicas", "no time left to drain", "two caches",
    "a claim without a size", "the form dpo without a reference model",
    "a reference model without a reward model", "two queues",
    "GPUs among the resources of jobs", "an update that replaces no pod",
    "a schedule of a benchmark without an endpoint", "experiment trackers of a job that uses none",
    "a target of KEDA that only the HPA has", "a variable that follows from the recipe",
    "RDMA devices among the resources of jobs",
]  # fmt: skip


@pytest.mark.parametrize("mistake", CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_line_with_a_remedy(
    chart: SimpleNamespace, mistake: str
) -> None:
    """The schema would say `Must validate "else" as "if" was not valid`."""
    (values,) = [m[1] for m in MISTAKES if m[0] == mistake]
    done = chart.template(values, major="3")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert re.search(r"\): [a-z0-9]+(\.[A-Za-z]+| \(for [a-z-]+\))", line), line
    assert re.search(r"; |: (must|set|name|dpo|KEDA|no|a claim)", line), line
    assert "Must validate" not in done.stderr


@pytest.mark.parametrize("major", ["3", "4"])
def test_set_takes_decimals(chart: SimpleNamespace, major: str) -> None:
    """`--set` reads decimals as strings."""
    done = chart.run_helm(
        "template", "tita", str(chart.path), "--set=s3.bucket=my-bucket,inference.enabled=true",
        "--set=inference.weight=0.2,inference.plausibility=0.05",
        "--set=inference.rewards.a=x,inference.rewards.b=y,inference.weights.a=0.25",
        "--set=inference.engine=vllm,inference.vllm.gpuMemoryUtilization=0.85",
        "--set=jobs.perJob.train-dpo.recipe.beta=0.25,jobs.scratch.size=1000", major=major,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    objects = [o for o in yaml.safe_load_all(done.stdout) if o]
    (container,) = server(objects)["containers"]
    given = {"--weight=a=0.25", "--plausibility=0.05", "--gpu-memory-utilization=0.85"}
    assert given <= set(container["args"])
    benchmark = json.loads(env(worker(objects, "benchmark"))["TITA_RECIPE"])
    assert benchmark["weights"] == [0, {"a": 0.25}]
    recipe = json.loads(env(worker(objects))["TITA_RECIPE"])
    assert load_recipe(RECIPES["train-dpo"], recipe).beta == 0.25  # type: ignore[attr-defined]
    for wrong in ("inference.weight=100.5", "inference.weight=x", "inference.plausibility=1.5",
                  "inference.weight=-0.1", "inference.plausibility=0x", "inference.weights.a=101",
                  "inference.weights.a=x", "inference.vllm.gpuMemoryUtilization=1.1",
                  "inference.vllm.gpuMemoryUtilization=0.0"):  # fmt: skip
        done = chart.run_helm(
            "template", "tita", str(chart.path), f"--set=s3.bucket=my-bucket,{wrong}", major=major
        )
        assert done.returncode != 0, wrong
        assert wrong.partition("=")[0].split(".")[-1] in done.stderr


@pytest.mark.parametrize("major", ["3", "4"])
def test_amounts_are_those_that_kubernetes_takes(chart: SimpleNamespace, major: str) -> None:
    """A YAML number is a quantity, too; https://pkg.go.dev/k8s.io/apimachinery/pkg/api/resource#Quantity"""
    amounts = {
        "cpu": 0.5, "memory": 12e9, "ephemeral-storage": "1e3", "hugepages-2Mi": "+4Mi",
        "example.com/a": 2, "example.com/b": "500m", "example.com/c": ".5Gi", "example.com/d": "7.",
        "example.com/e": "12E6", "example.com/f": "100u", "example.com/g": "1E",
    }  # fmt: skip
    resources = {"requests": amounts, "limits": {"cpu": 1.5}}
    tolerations = [
        {"operator": "Exists", "effect": ""},
        {"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": -1},
        {"key": "b", "operator": "Gt", "value": "5", "effect": "NoSchedule"},
    ]
    parts = ("jobs", "inference", "s3.embedded")
    values: dict[str, Any] = {f"{part}.resources": resources for part in parts}
    values |= {f"{part}.tolerations": tolerations for part in parts}
    sizes = ("jobs.shmSize", "jobs.scratch.size", "inference.cache.size", "inference.shmSize")
    profile = {"type": "RuntimeDefault"}
    objects = chart.render(
        {**values, **dict.fromkeys(sizes, 1.5e9), "s3.embedded.persistence.size": 50e9,
         "podSecurityContext.appArmorProfile": profile, "securityContext.appArmorProfile": profile,
         "podSecurityContext.supplementalGroupsPolicy": "Strict"},
        files=("trial",), major=major,
    )  # fmt: skip
    for o in objects:
        kubernetes_validate.validate(o, chart.newest, strict=True)
    for pod in (worker(objects), server(objects)):
        assert pod["containers"][0]["resources"]["requests"] == amounts
        assert pod["containers"][0]["resources"]["limits"]["cpu"] == 1.5
        assert pod["tolerations"] == tolerations
        (shm,) = [v for v in pod["volumes"] if v["name"] == "shm"]
        assert float(shm["emptyDir"]["sizeLimit"]) == 1.5e9
    assert env(worker(objects))["TITA_SCRATCH_VOLUME_GIB"] == "1.327"


def test_the_weights_that_the_chart_allows_are_those_of_the_server(
    schema: dict[str, Any],
) -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    weight = schema["properties"]["inference"]["properties"]["weight"]
    for largest in (weight["maximum"], weight["minimum"]):
        serve.make_context("serve", ["--base=b", f"--weight={largest}"])
        load_recipe(RECIPES["benchmark"], {"weights": [largest]})
    for wrong in (weight["maximum"] + 1, weight["minimum"] - 1):
        with pytest.raises(Exception, match=r"give a number from 0 to 100"):
            serve.make_context("serve", ["--base=b", f"--weight={wrong}"])
        with pytest.raises(TitaError):
            load_recipe(RECIPES["benchmark"], {"weights": [wrong]})


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The paths of all values and sections."""
    found = []
    for key, value in values.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict) and not key.startswith(("perJob", "podSec", "securityC")):
            found += leaves(value, f"{prefix}{key}.")
    return found


def test_null_is_taken_or_refused_by_name(
    chart: SimpleNamespace, schema: dict[str, Any], values: dict[str, Any]
) -> None:
    """helm removes a key that is set to null. Templates must not fail on what the schema takes."""
    validator = jsonschema.Draft7Validator(schema)

    def without(path: str) -> dict[str, Any]:
        copied: dict[str, Any] = json.loads(json.dumps(values))
        *parents, last = path.split(".")
        inner = copied
        for key in parents:
            inner = inner[key]
        del inner[last]
        return copied

    taken = []
    for path in leaves(values):
        errors = list(validator.iter_errors(without(path)))
        assert all(path.rpartition(".")[2] in error.message for error in errors)
        if not errors:
            taken.append(path)
    assert len(taken) > 60
    assert "inference.resources" in taken
    given = (
        {"s3.bucket": "my-bucket", "inference.enabled": True, "networkPolicy.enabled": True},
        {"s3.embedded.enabled": True, "inference.enabled": True, "rbac.clusterRole": True,
         "metrics.serviceMonitor.enabled": True, "inference.autoscaling.enabled": True,
         "inference.cache.persistence.enabled": True},
        {"s3.bucket": "my-bucket", "jobs.kueue.queueName": "q", "metrics.dashboard.enabled": True},
    )  # fmt: skip
    for settings in given:
        nulls = [
            path
            for path in taken
            if not any(f"{key}.".startswith(f"{path}.") for key in settings)
            and path.rpartition(".")[0] not in taken
        ]
        done = chart.template({**settings, **dict.fromkeys(nulls)}, files=())
        assert done.returncode == 0, done.stderr
        for o in yaml.safe_load_all(done.stdout):
            if o and o["kind"] not in CUSTOM:
                kubernetes_validate.validate(o, chart.newest, strict=True)


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
        "nodes", "gpusPerNode", "schedule", "tries", "activeDeadlineSeconds", "recipe",
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
