"""Each value has the documented effect, and the effect is absent without it."""

import json
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.chart.values import general, inference, jobs, s3
from tests.chart.values.case import (
    SERVING,
    Case,
    Objects,
    deployment,
    env,
    job,
    jobspec,
    server,
    volume,
    worker,
)
from tita.align import Guidance
from tita.recipes import BenchmarkRecipe, load_recipe
from tita.settings import Settings

CASES: dict[str, Case] = {**general.CASES, **s3.CASES, **jobs.CASES, **inference.CASES}


def holds(case: Case, objects: Objects) -> bool:
    try:
        return bool(case.holds(objects))
    except (KeyError, IndexError, StopIteration):
        return False


@cache
def together(given: str) -> dict[str, Any]:
    """Values of all cases with the same prerequisites that can be rendered together."""
    return {
        name: case.value
        for name, case in CASES.items()
        if json.dumps(case.given) == given and not case.alone
    }


def rendered_for(chart: SimpleNamespace, name: str) -> Objects:
    """Render the chart with this value and with all values that do not interfere."""
    case = CASES[name]
    values = {name: case.value} if case.alone else together(json.dumps(case.given))
    objects: Objects = chart.render({**case.given, **values})
    return objects


@pytest.mark.parametrize("name", CASES)
def test_value_has_its_effect(chart: SimpleNamespace, name: str) -> None:
    case = CASES[name]
    assert not holds(case, chart.render(dict(case.given))), "holds without the value"
    assert holds(case, rendered_for(chart, name))


def test_every_value_is_documented_and_tested(chart: SimpleNamespace) -> None:
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    source = (chart.path / "values.yaml").read_text()
    assert {value.path for value in script.documented_values(source)} == set(CASES)


@pytest.mark.parametrize(
    ("key", "value", "holds"),
    [
        ("nodes", 2, lambda o: env(worker(o))["TITA_NUM_NODES"] == "2"),
        ("gpusPerNode", 8, lambda o: env(worker(o))["TITA_PROCS_PER_NODE"] == "8"),
        ("gpusPerNode", 0, lambda o: "nvidia" not in str(worker(o)["containers"][0]["resources"])),
        ("schedule", "@daily", lambda o: not job(o)["spec"]["suspend"]),
        ("tries", 0, lambda o: jobspec(o)["backoffLimit"] == 0),
        ("activeDeadlineSeconds", 60, lambda o: jobspec(o)["activeDeadlineSeconds"] == 60),
        ("recipe", {"beta": 0.5}, lambda o: env(worker(o))["TITA_RECIPE"] == '{"beta":0.5}'),
        ("nodeSelector", {"a": "b"}, lambda o: worker(o)["nodeSelector"] == {"a": "b"}),
    ],
)
def test_per_job_value(
    chart: SimpleNamespace, key: str, value: Any, holds: Callable[[Objects], bool]
) -> None:
    assert holds(chart.render({"jobs.perJob.train-dpo": {key: value}}))
    others = chart.render({"jobs.perJob.train-dpo": {key: value}})
    assert worker(others, "build-pairs") == worker(chart.render(), "build-pairs")


@pytest.mark.parametrize(
    ("part", "kind", "name"),
    [
        ("jobs", "CronJob", "tita-train-dpo"),
        ("jobs", "Pod", "tita-test"),
        ("inference", "Deployment", "tita-inference"),
    ],
)
def test_extra_env_overrides_the_charts_environment(
    chart: SimpleNamespace, part: str, kind: str, name: str
) -> None:
    """Each name appears once: server-side apply (Helm 4) rejects duplicates."""
    mine = [{"name": "HF_HOME", "value": "/mine"}, {"name": "NEW", "value": "1"}]
    objects = chart.render({**SERVING, f"{part}.extraEnv": mine})
    pods = dict(chart.pod_templates(objects))
    (container,) = pods[f"{kind}/{name}"]["spec"]["containers"]
    assert [e["value"] for e in container["env"] if e["name"] == "HF_HOME"] == ["/mine"]
    assert chart.environment(container)["NEW"] == "1"


class StrictLoader(yaml.SafeLoader):
    """Rejects a key that appears twice, as Flux and kustomize do."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: {keys}"
        return super().construct_mapping(node, deep=deep)


def test_labels_of_one_object_override_common_labels(chart: SimpleNamespace) -> None:
    own = {"team": "mine"}
    values = {
        **SERVING,
        "commonLabels": {"team": "ours", "cost": "ours"},
        "jobs.labels": own,
        "jobs.podLabels": own,
        "inference.podLabels": own,
        "metrics.serviceMonitor": {"enabled": True, "labels": own},
        "metrics.dashboard": {"enabled": True, "labels": own},
    }
    done = chart.template(values)
    objects = [o for o in yaml.load_all(done.stdout, Loader=StrictLoader) if o]
    job = chart.find(objects, "CronJob", "tita-train-dpo")["spec"]["jobTemplate"]
    overridden = [
        job,
        job["spec"]["template"],
        deployment(objects)["spec"]["template"],
        chart.find(objects, "Pod", "tita-test"),
        chart.find(objects, "ServiceMonitor", "tita-inference"),
        chart.find(objects, "ConfigMap", "tita-inference-dashboard"),
    ]
    assert [o["metadata"]["labels"]["team"] for o in overridden] == ["mine"] * 6
    assert [o["metadata"]["labels"]["cost"] for o in overridden] == ["ours"] * 6
    assert chart.find(objects, "CronJob", "tita-train-dpo")["metadata"]["labels"]["team"] == "ours"


@pytest.mark.parametrize("files", ["full", "trial"])
def test_common_labels_reach_every_object_and_pod_and_no_selector(
    chart: SimpleNamespace, files: str
) -> None:
    """Selectors are immutable: an upgrade that adds a label would fail."""
    values = {"commonLabels": {"cost": "42"}, "jobs.cache.storageClass": "fast",
              "jobs.cache.existingClaim": "", "jobs.cache.size": "9Gi"}  # fmt: skip
    objects = chart.render(values, files=(files,))
    ours = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}
    for o in objects:
        assert o["metadata"]["labels"]["cost"] == "42", o["metadata"]["name"]
        if o["kind"] == "CronJob":
            assert o["spec"]["jobTemplate"]["metadata"]["labels"]["cost"] == "42"
        selector = o.get("spec", {}).get("selector") or {}
        assert set(selector.get("matchLabels", selector)) <= ours
    for where, pod in chart.pod_templates(objects):
        assert pod["metadata"]["labels"]["cost"] == "42", where
        for claim in (v["ephemeral"] for v in pod["spec"]["volumes"] if "ephemeral" in v):
            assert claim["volumeClaimTemplate"]["metadata"]["labels"] == {"cost": "42"}
    assert "ephemeral" in volume(worker(objects), "cache")


def test_large_numbers_are_rendered_as_integers(chart: SimpleNamespace) -> None:
    """Numbers in Helm are floats and would be rendered as 2.592e+06."""
    month = {"ttlSecondsAfterFinished": 2592000, "activeDeadlineSeconds": 2592000}
    done = chart.template({"jobs.perJob.train-dpo": month})
    assert done.stdout.count(" 2592000\n") == 2
    assert "e+0" not in done.stdout


def test_keda_uses_the_stabilization_window(chart: SimpleNamespace) -> None:
    values = {
        **SERVING,
        "inference.autoscaling.enabled": True,
        "inference.autoscaling.kind": "keda",
        "inference.autoscaling.scaleDownStabilizationSeconds": 60,
    }
    scaled = chart.find(chart.render(values), "ScaledObject", "tita-inference")["spec"]
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == {"scaleDown": {"stabilizationWindowSeconds": 60}}


def test_an_upgrade_loses_no_request(chart: SimpleNamespace) -> None:
    objects = chart.render(SERVING)
    rolling = deployment(objects)["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    (container,) = server(objects)["containers"]
    slept = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    # Proxies notice within a readiness period; running requests may finish after that.
    assert slept >= container["readinessProbe"]["periodSeconds"]
    assert server(objects)["terminationGracePeriodSeconds"] > 60 + slept


def test_a_claim_of_the_model_cache_suits_block_storage(chart: SimpleNamespace) -> None:
    values = {**SERVING, "inference.cache.persistence.enabled": True}
    claim = chart.find(chart.render(values), "PersistentVolumeClaim", "tita-inference-cache")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_an_upgrade_replaces_a_store_that_never_became_ready(chart: SimpleNamespace) -> None:
    """With OrderedReady the StatefulSet controller waits for ever for the old pod."""
    store = chart.find(chart.render(files=("trial",)), "StatefulSet", "tita-s3")
    assert store["spec"]["podManagementPolicy"] == "Parallel"


def test_a_hung_server_is_restarted_soon(chart: SimpleNamespace) -> None:
    pod = server(chart.render(SERVING))
    probe = pod["containers"][0]["livenessProbe"]
    until_killed = probe["periodSeconds"] * probe["failureThreshold"]
    assert probe["terminationGracePeriodSeconds"] < until_killed
    assert probe["terminationGracePeriodSeconds"] < pod["terminationGracePeriodSeconds"]


def test_a_recipe_is_merged_into_that_of_the_benchmark(chart: SimpleNamespace) -> None:
    objects = chart.render({**SERVING, "jobs.perJob.benchmark.recipe": {"concurrency": 2}})
    recipe = env(worker(objects, "benchmark"))["TITA_RECIPE"]
    assert '"concurrency":2' in recipe
    assert '"base_url":"http://tita-inference:8000/v1"' in recipe


def test_the_benchmark_is_suspended_without_an_endpoint(chart: SimpleNamespace) -> None:
    assert job(chart.render(), "benchmark")["spec"]["suspend"]
    serving = job(chart.render(SERVING), "benchmark")["spec"]
    assert not serving["suspend"]
    assert serving["concurrencyPolicy"] == "Forbid"
    elsewhere = {"jobs.perJob.benchmark.recipe": {"base_url": "http://elsewhere/v1"}}
    assert not job(chart.render(elsewhere), "benchmark")["spec"]["suspend"]
    scheduled = {"jobs.perJob.benchmark.schedule": "0 5 * * *"}
    spec = job(chart.render({**elsewhere, **scheduled}), "benchmark")["spec"]
    assert (spec["schedule"], spec["suspend"]) == ("0 5 * * *", False)
    # Off on purpose, so that the schedule may stay.
    off = {**scheduled, "jobs.perJob.benchmark.suspend": True}
    assert job(chart.render(off), "benchmark")["spec"]["suspend"]


def test_an_empty_schedule_ends_the_nightly_benchmark(chart: SimpleNamespace) -> None:
    objects = chart.render({**SERVING, "jobs.perJob.benchmark.schedule": ""})
    assert job(objects, "benchmark")["spec"]["suspend"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0, 0.3]),
        ({"reward": ""}, [0]),
        ({"reward": "", "form": "vcd", "weight": 0.5}, [0, 0.5]),
        ({"rewards": {"a": "runs/a/model"}}, [0, 0.3]),
        ({"rewards": {"a": "x", "b": "y"}}, [0, {"a": 0.15, "b": 0.15}]),
        ({"rewards": {"a": "x", "b": "y"}, "weight": 0}, [0, 0]),
        (
            {"rewards": {"a": "x", "b": "y"}, "weights": {"a": 0.2, "b": "0.1"}},
            [0, {"a": 0.2, "b": 0.1}],
        ),
    ],
)
def test_the_benchmark_measures_the_weights_that_are_served(
    chart: SimpleNamespace, values: dict[str, Any], expected: list[Any]
) -> None:
    """As the server resolves them, which has the same arguments."""
    objects = chart.render({f"inference.{name}": value for name, value in values.items()} | SERVING)
    recipe = json.loads(env(worker(objects, "benchmark"))["TITA_RECIPE"])
    assert recipe["weights"] == expected
    load_recipe(BenchmarkRecipe, recipe)
    # One weight for several reward models, or one for none, is an error of a request.
    rewards = list(values.get("rewards") or (["reward"] if values.get("reward", "r") else []))
    form, weight = values.get("form", "tita"), values.get("weight", 0.3)
    named = {name: float(each) for name, each in values.get("weights", {}).items()}
    served = Guidance.of(form=form, weight=weight, weights=named).among(rewards)
    last = recipe["weights"][-1]
    given = {"weights": last} if isinstance(last, dict) else {"weight": last}
    asked = Guidance.of(form=form, **given)
    assert asked.reward_weights(rewards) == served.reward_weights(rewards)


@pytest.mark.parametrize(
    ("size", "gib"),
    [("200Gi", 190), ("1Ti", 972.8), ("1.5Ti", 1459), ("512Mi", 0.475), ("10G", 8.848), ("", None)],
)
def test_programs_know_the_limits_of_their_volumes(
    chart: SimpleNamespace, size: str, gib: float | None
) -> None:
    """The kubelet evicts a pod that exceeds them, and its replacement, and does not count that."""
    names = ("TITA_CACHE_VOLUME_GIB", "TITA_SCRATCH_VOLUME_GIB")
    values = dict.fromkeys(("jobs.cache.size", "jobs.scratch.size", "inference.cache.size"), size)
    objects = chart.render(SERVING | values)
    for name in names:
        found = env(worker(objects)).get(name)
        assert found == (None if gib is None else f"{gib:g}")
        assert found is None or name.removeprefix("TITA_").lower() in Settings.model_fields
    assert env(server(objects)).get(names[0]) == env(worker(objects)).get(names[0])
    # A claim's file system has its size.
    claims = {
        "jobs.cache.storageClass": "fast",
        "jobs.scratch.storageClass": "fast",
        "inference.cache.persistence.enabled": True,
    }
    if size:
        objects = chart.render(SERVING | values | claims)
        assert not any(
            name in env(pod) for pod in (worker(objects), server(objects)) for name in names
        )
