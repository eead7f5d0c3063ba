"""Tests on a real cluster of what the other tests check with schemas and an in-memory API server.

Set TITA_TEST_KUBECONFIG to a kubeconfig with cluster-admin rights. The tests create namespaces that
enforce the Pod Security level *restricted*, and delete them. They need no GPU, image, bucket,
storage class or CRD, and no pod has to start. Custom resources are tested if their CRD exists.
"""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.chart.test_rendering import CUSTOM
from tests.chart.test_values import CASES, rendered_for
from tests.chart.values.case import Objects

KUBECONFIG = os.environ.get("TITA_TEST_KUBECONFIG", "")
EVERYTHING = {
    "inference.httpRoute.enabled": False,
    "metrics.serviceMonitor.enabled": False,
    "rbac.clusterRole": False,
    "image.registry": "registry.invalid",
}
KINDS = "all,configmap,endpointslice,ingress,networkpolicy,pdb,pvc,role,rolebinding,secret,sa"

Run = Callable[..., str]

pytestmark = pytest.mark.skipif(not KUBECONFIG, reason="TITA_TEST_KUBECONFIG is not set")


@pytest.fixture(scope="module")
def run(chart: SimpleNamespace, request: pytest.FixtureRequest) -> Run:
    """Run helm (4 unless parametrized) or kubectl; returns stderr and stdout."""
    major = getattr(request, "param", "4")
    folder = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir(major)

    def command(tool: str, *arguments: str, given: str | None = None) -> str:
        done = subprocess.run(
            [folder / tool, *arguments],
            env={**os.environ, "KUBECONFIG": KUBECONFIG},
            input=given, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stderr + done.stdout

    return command


@pytest.fixture
def namespace(run: Run) -> Iterator[str]:
    """A namespace that rejects pods which violate *restricted*."""
    name = f"tita-test-{uuid.uuid4().hex[:8]}"
    run("kubectl", "create", "namespace", name)
    levels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "warn")]
    run("kubectl", "label", "namespace", name, *levels)
    yield name
    run("kubectl", "delete", "namespace", name, "--wait=false")


@pytest.fixture
def deploy(run: Run, namespace: str, chart: SimpleNamespace) -> Run:
    """Run `helm install` or `helm upgrade` with a values file, without custom resources."""

    def command(verb: str, files: str, **values: Any) -> str:
        changes = {**(EVERYTHING if files == "full" else {}), **values}
        return run(
            "helm", verb, "tita", str(chart.path), f"--namespace={namespace}",
            f"--values={chart.path / 'ci' / files}-values.yaml",
            *[f"--set-json={key}={json.dumps(value)}" for key, value in changes.items()],
        )  # fmt: skip

    return command


@pytest.fixture
def created_objects(run: Run, namespace: str) -> Callable[[], dict[str, str]]:
    """Map kind/name to uid, for objects that the cluster did not create itself."""

    def look() -> dict[str, str]:
        kept = "{range .items[*]}{.kind}/{.metadata.name} {.metadata.uid}{'\\n'}{end}"
        output = run(
            "kubectl", "get", KINDS, f"--namespace={namespace}", f"--output=jsonpath={kept}"
        )
        found = dict(line.split() for line in output.splitlines() if "/" in line)
        made = ("Pod/", "ReplicaSet/", "EndpointSlice/", "Secret/sh.helm", "ControllerRevision/")
        return {
            name: uid
            for name, uid in found.items()
            if not name.startswith(made) and "kube-root-ca" not in name and name not in before
        }

    before: dict[str, str] = {}
    before = look()
    return look


@pytest.mark.parametrize("run", ["3", "4"], indirect=True)
@pytest.mark.parametrize("files", ["default", "full", "trial"])
def test_install_upgrade_rollback_uninstall(
    run: Run, namespace: str, deploy: Run, created_objects: Callable[[], dict[str, str]], files: str
) -> None:
    output = deploy("install", files)
    assert "violate" not in output
    first = created_objects()
    by_hand = ["create", "job", "by-hand", "--from=cronjob/tita-train-dpo", "-n", namespace]
    assert "violate" not in run("kubectl", *by_hand)

    changes = {"image.tag": "2.0.0", "jobs.resources.requests.memory": "32Gi"}
    deploy("upgrade", files, **changes)
    after = created_objects()
    assert first.items() <= after.items(), "an upgrade recreated an object"
    assert set(after) - set(first) == {"Job/by-hand"}

    run("helm", "rollback", "tita", "1", f"--namespace={namespace}")
    assert created_objects() == after
    run("helm", "uninstall", "tita", f"--namespace={namespace}", "--wait")
    run("kubectl", "delete", "job", "by-hand", "-n", namespace, "--ignore-not-found")
    claim = {"PersistentVolumeClaim/tita-s3"} if files == "trial" else set()
    assert set(created_objects()) == claim
    if claim:  # the next release uses it
        deploy("install", files)
        assert created_objects().items() >= {name: after[name] for name in claim}.items()


def without_needs(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a pod spec without references that admission would look up in the cluster."""
    needs = ("priorityClassName", "runtimeClassName")
    kept = {key: value for key, value in spec.items() if key not in needs}
    return {**kept, "serviceAccountName": "default"}


def test_the_api_accepts_the_objects_of_every_value(
    run: Run, namespace: str, chart: SimpleNamespace
) -> None:
    """A server-side dry run also validates enums, names and quantities."""
    served = run("kubectl", "api-resources", "--no-headers").splitlines()
    unknown = CUSTOM - {line.split()[-1] for line in served}
    texts = set()
    for name in CASES:
        for o in rendered_for(chart, name):
            if o["kind"] not in unknown:
                o["metadata"].pop("namespace", None)
                if o["kind"] == "Pod":
                    o["spec"] = without_needs(o["spec"])
                texts.add(json.dumps(o, sort_keys=True))
    every = yaml.safe_dump_all([json.loads(text) for text in sorted(texts)])
    dry = ["create", "--dry-run=server", "--validate=strict", "-n", namespace, "-f", "-"]
    output = run("kubectl", *dry, given=every)
    assert output.count("created (server dry run)") == len(texts) > 100
    assert "violate" not in output


@pytest.mark.parametrize("files", ["default", "full", "trial"])
def test_every_pod_is_admitted(
    run: Run, namespace: str, chart: SimpleNamespace, files: str
) -> None:
    pods: Objects = []
    for _, template in chart.pod_templates(chart.render(files=(files,))):
        spec = {**without_needs(template["spec"]), "restartPolicy": "Never"}
        metadata = {"name": f"p{len(pods)}", "labels": template["metadata"]["labels"]}
        pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    dry = ["create", "--dry-run=server", "--validate=strict", "-n", namespace, "-f", "-"]
    output = run("kubectl", *dry, given=yaml.safe_dump_all(pods))
    assert output.count("created (server dry run)") == len(pods)


@pytest.fixture
def launcher(run: Run, namespace: str, deploy: Run, tmp_path: Path) -> Callable[..., str]:
    """Run `tita` as a service account that is bound only to the chart's Role."""
    account = {"kind": "ServiceAccount", "name": "ada", "namespace": namespace}
    deploy("install", "default", **{"rbac.subjects": [account]})
    run("kubectl", "create", "serviceaccount", "ada", "-n", namespace)
    token = run("kubectl", "create", "token", "ada", "-n", namespace).strip()
    config = json.loads(
        run("kubectl", "config", "view", "--minify", "--flatten", "--raw", "--output=json")
    )
    config["users"][0]["user"] = {"token": token}
    config["contexts"][0]["context"]["namespace"] = namespace
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps(config))

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tita", *arguments],
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    return command


def test_the_role_allows_launching_and_nothing_else(
    run: Run, namespace: str, launcher: Callable[..., str]
) -> None:
    assert "may launch and watch" in launcher("doctor")
    launched = json.loads(launcher("launch", "train-dpo", "--gpus", "4", "--detach", "-o", "json"))
    name = launched["run"]
    job = json.loads(run("kubectl", "get", "job", name, "-n", namespace, "-o", "json"))
    assert job["spec"]["completions"] == 4
    assert [row["run"] for row in json.loads(launcher("jobs", "list", "-o", "json"))] == [name]
    assert json.loads(launcher("jobs", "status", name, "-o", "json"))["run"] == name
    run("helm", "uninstall", "tita", f"--namespace={namespace}", "--wait")
    assert name in run("kubectl", "get", "jobs", "-n", namespace), "uninstall must keep runs"
    account = f"system:serviceaccount:{namespace}:ada"
    for verb, what in (("get", "secrets"), ("create", "pods"), ("update", "jobs")):
        done = subprocess.run(
            ["kubectl", "auth", "can-i", verb, what, "-n", namespace, f"--as={account}"],
            env={**os.environ, "KUBECONFIG": KUBECONFIG}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip() == "no"
