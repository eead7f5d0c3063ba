"""Rendered objects are valid for old and new Kubernetes and the same with Helm 3 and 4."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

# Custom resources, for which kubernetes-validate has no schema.
CUSTOM = {"HTTPRoute", "ServiceMonitor", "ScaledObject"}
FILES = ("default", "full", "trial")
# kubernetes-validate does not check enums.
ENUMS = {
    "action": {"FailJob", "Ignore"},
    "apiGroup": {"rbac.authorization.k8s.io"},
    "completionMode": {"Indexed"},
    "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "effect": {"NoExecute", "NoSchedule", "PreferNoSchedule"},
    "fsGroupChangePolicy": {"Always", "OnRootMismatch"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "medium": {"Memory"},
    "operator": {"Equal", "Exists", "In"},
    "pathType": {"Exact", "ImplementationSpecific", "Prefix"},
    "podReplacementPolicy": {"Failed"},
    "restartPolicy": {"Never"},
    "terminationMessagePolicy": {"FallbackToLogsOnError", "File"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
}
QUANTITY = re.compile(r"^\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")
DNS_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")


@pytest.mark.parametrize("kube", ["1.28", "1.31", "1.36"])
@pytest.mark.parametrize("files", FILES)
def test_every_object_is_strictly_valid(chart: SimpleNamespace, files: str, kube: str) -> None:
    for o in chart.render(files=(files,), kube=kube):
        if o["kind"] not in CUSTOM:
            kubernetes_validate.validate(o, kube, strict=True)


def test_the_validator_rejects_an_unknown_field(chart: SimpleNamespace) -> None:
    deployment = chart.find(chart.render(files=("trial",)), "Deployment", "tita-inference")
    deployment["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, chart.newest, strict=True)


@pytest.mark.parametrize("kube", ["1.28", "1.31", "1.36"])
@pytest.mark.parametrize("files", FILES)
def test_helm_3_and_4_render_the_same(chart: SimpleNamespace, files: str, kube: str) -> None:
    def without_secrets(major: str) -> list[dict[str, Any]]:
        objects = chart.render(files=(files,), major=major, kube=kube)
        return [o for o in objects if o["kind"] != "Secret"]

    def order(o: dict[str, Any]) -> tuple[str, str]:
        return o["kind"], o["metadata"]["name"]

    assert sorted(without_secrets("3"), key=order) == sorted(without_secrets("4"), key=order)


@pytest.mark.parametrize("files", FILES)
def test_rendering_is_deterministic(chart: SimpleNamespace, files: str) -> None:
    """GitOps needs this. Keys and certificate of the embedded store are random unless given."""
    given = {"s3.existingSecret": "keys", "s3.embedded.existingCertificate": "certificate"}
    values = given if files == "trial" else {}
    first, again = (chart.template(values, files=(files,)) for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == again.stdout


@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize("files", FILES)
def test_helm_lint_passes(chart: SimpleNamespace, files: str, major: str) -> None:
    values = chart.path / "ci" / f"{files}-values.yaml"
    done = chart.run_helm("lint", "--strict", str(chart.path), "--values", str(values), major=major)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_older_kubernetes_is_rejected(chart: SimpleNamespace) -> None:
    done = chart.template(kube="1.27")
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr


@pytest.mark.parametrize("major", ["3", "4"])
def test_a_packaged_chart_renders_the_same(
    chart: SimpleNamespace, tmp_path: Path, major: str
) -> None:
    done = chart.run_helm("package", str(chart.path), "--destination", str(tmp_path), major=major)
    assert done.returncode == 0, done.stderr
    packaged = chart.template(major=major, chart=next(tmp_path.glob("*.tgz")))
    assert packaged.returncode == 0, packaged.stderr
    assert packaged.stdout == chart.template(major=major).stdout


def leaves(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every string in an object."""
    if isinstance(part, dict):
        for key, value in part.items():
            if isinstance(value, str):
                yield key, value
            else:
                yield from leaves(value)
    elif isinstance(part, list):
        for element in part:
            yield from leaves(element)


def test_enums_have_allowed_values(objects: list[dict[str, Any]]) -> None:
    for key, value in (leaf for o in objects for leaf in leaves(o)):
        assert key not in ENUMS or value in ENUMS[key], f"{key}: {value}"


def test_names_are_unique_and_valid(objects: list[dict[str, Any]]) -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names))
    for kind, name in names:
        if kind.startswith("ClusterRole"):
            assert name == "tita:lab:tita:launcher"
        else:
            assert DNS_LABEL.match(name), f"{kind} {name}"


@pytest.mark.parametrize("files", ["full", "trial"])
@pytest.mark.parametrize("names", [{}, {"fullnameOverride": "b" * 70}, {"nameOverride": "c" * 70}])
def test_long_names_are_truncated(
    chart: SimpleNamespace, files: str, names: dict[str, str]
) -> None:
    for o in chart.render(names, files=(files,), release="a" * 53):
        name = o["metadata"]["name"]
        if o["kind"] == "CronJob":
            # The controllers append minutes since 1970 to the Job, and the index to the pod's host.
            name += "-29827500-99999"
        assert len(name) <= 63, name
        assert DNS_LABEL.match(name) or o["kind"].startswith("ClusterRole")
        for label in o["metadata"]["labels"].values():
            assert len(label) <= 63


@pytest.mark.parametrize(
    "releases",
    [
        (f"{'a' * 45}-eu-1", f"{'a' * 45}-eu-2"),
        ("a.b", "a-b"),
        ("1-a", "r-1-a"),
    ],
)
def test_names_of_two_releases_differ(chart: SimpleNamespace, releases: tuple[str, str]) -> None:
    def names(release: str) -> set[tuple[str, str]]:
        found = chart.render(files=("trial",), release=release)
        for o in found:
            # A Service's name starts with a letter, before Kubernetes 1.34.
            assert re.match(r"[a-z]", o["metadata"]["name"])
            assert DNS_LABEL.match(o["metadata"]["name"])
        return {(o["kind"], o["metadata"]["name"]) for o in found}

    first, second = map(names, releases)
    assert not first & second


@pytest.mark.parametrize("word", ["123", "true", "1e3"])
@pytest.mark.parametrize("files", ["full", "trial"])
def test_words_that_yaml_would_convert_stay_strings(
    chart: SimpleNamespace, files: str, word: str
) -> None:
    """Names of releases, namespaces and objects that look like numbers or booleans."""
    values = dict.fromkeys(
        ("jobs.priorityClassName", "jobs.runtimeClassName", "jobs.schedulerName",
         "jobs.cache.existingClaim", "jobs.kueue.queueName", "s3.existingSecret",
         "huggingface.existingSecret", "serviceAccount.name", "inference.auth.existingSecret",
         "inference.auth.secretKey", "inference.ingress.className", "inference.modelName",
         "s3.secretKeys.accessKeyId", "s3.embedded.persistence.storageClass",
         "inference.cache.persistence.storageClass", "inference.cache.persistence.existingClaim"),
        word,
    )  # fmt: skip
    settings = {**values, "imagePullSecrets": [{"name": word}], "commonLabels": {"a": word}}
    done = chart.run_helm(
        "template", word, str(chart.path), "--namespace", word, "--kube-version", chart.newest,
        f"--values={chart.path / 'ci' / files}-values.yaml",
        *[f"--set-json={key}={json.dumps(value)}" for key, value in settings.items()],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for o in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader):
        if o:
            assert o["metadata"].get("namespace", word) == word
            assert o["metadata"]["labels"]["app.kubernetes.io/instance"] == word
            if o["kind"] not in CUSTOM:
                kubernetes_validate.validate(o, chart.newest, strict=True)
                assert o["metadata"]["labels"]["a"] == word


def test_every_object_has_release_labels_and_namespace(objects: list[dict[str, Any]]) -> None:
    for o in objects:
        labels = o["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "tita"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        if not o["kind"].startswith("Cluster"):
            assert o["metadata"]["namespace"] == "lab"


def test_every_container_has_requests_and_a_memory_limit(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    for where, container in chart.containers(objects):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys(), where
        assert "memory" in resources["limits"], where
        for amounts in resources.values():
            assert all(QUANTITY.match(str(amount)) for amount in amounts.values()), where


def test_kubectl_parses_a_template(chart: SimpleNamespace, tmp_path: Path) -> None:
    """`kubectl create job --from` needs a cluster; `kubectl label --local` does not."""
    helm_dir = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir()
    file = tmp_path / "cronjob.yaml"
    file.write_text(yaml.safe_dump(chart.find(chart.render(), "CronJob", "tita-train-dpo")))
    done = subprocess.run(
        [helm_dir / "kubectl", "label", "--local", "-f", file, "a=b", "-o", "name"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "cronjob.batch/tita-train-dpo", done.stderr
