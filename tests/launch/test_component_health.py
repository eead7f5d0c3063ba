"""Health of the release's embedded store and inference."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tita.launch.component_health import (
    EMBEDDED_STORE as STORE,
)
from tita.launch.component_health import (
    INFERENCE,
    Component,
    component_health,
)
from tita.launch.doctor import run_preflight
from tita.launch.preflight import CheckResult, CheckStatus
from tita.launch.submit import LaunchRequest, find_template, plan

VALUES = yaml.safe_load((Path(__file__).parents[2] / "charts" / "tita" / "values.yaml").read_text())

CLAIM = "data-of-tita"


READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}

SILENT = {
    "phase": "Running",
    "conditions": [
        {"type": "Ready", "status": "False"},
        {"type": "ContainersReady", "status": "True"},
    ],
}


def health(lab: Any, component: Component, *, part_of_the_release: bool = True) -> CheckResult:
    """The component's health; every chart value that the remedy names must exist."""
    template = find_template(lab.cluster, "train-dpo")
    if part_of_the_release:
        name = f"tita-{component.label}"
        template.cron_job["metadata"]["annotations"][component.annotation] = name
    found = component_health(lab.cluster, template, component)
    for path in re.findall(r"\b(?:jobs|inference|s3)(?:\.[A-Za-z]+)+", found.remedy):
        values = VALUES
        for key in path.split("."):
            assert key in values, f"{found.remedy!r} names {path}"
            values = values[key]
    return found


def put_workload(lab: Any, component: Component, *, replicas: int = 1, **more: Any) -> None:
    labels = {"app.kubernetes.io/instance": "tita"}
    labels["app.kubernetes.io/component"] = component.label
    spec = {"replicas": replicas} | more.pop("spec", {})
    item = {"metadata": {"name": f"tita-{component.label}", "labels": labels}, "spec": spec}
    lab.api.put(component.resource, item | more)


def put_pod(lab: Any, component: Component, *, number: int = 0, **status: Any) -> None:
    labels = {"app.kubernetes.io/instance": "tita"}
    labels["app.kubernetes.io/component"] = component.label
    put_workload(lab, component, replicas=number + 1)
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}}]
    item = {
        "metadata": {"name": f"tita-{component.label}-{number}", "labels": labels},
        "status": status,
    }
    lab.api.put("pods", item | {"spec": {"volumes": volumes, "nodeName": "node-1"}})


def put_claim(lab: Any, *, phase: str = "Pending", event: tuple[str, str] | None = None) -> None:
    spec = {"storageClassName": "nope"} if event and "nope" in event[1] else {}
    item = {"metadata": {"name": CLAIM}, "spec": spec, "status": {"phase": phase}}
    lab.api.put("persistentvolumeclaims", item)
    if event:
        lab.api.event(CLAIM, *event, kind="PersistentVolumeClaim")


def pending(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


UNBOUND = pending("0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.")
NO_CLASS = "no persistent volumes available for this claim and no storage class is set"
NOT_FOUND = 'storageclass.storage.k8s.io "nope" not found'


@pytest.mark.parametrize(
    "event",
    [None, ("FailedBinding", NO_CLASS), ("ProvisioningFailed", NOT_FOUND)],
)
@pytest.mark.parametrize(
    ("component", "value"),
    [(STORE, "s3.embedded.persistence"), (INFERENCE, "inference.cache.persistence")],
)
def test_unbound_claim(
    lab: Any, component: Component, value: str, event: tuple[str, str] | None
) -> None:
    put_pod(lab, component, **UNBOUND)
    put_claim(lab, event=event)
    found = health(lab, component)
    assert found.mark is CheckStatus.BAD
    assert found.text.startswith(f"0 of 1 pod ready: claim {CLAIM} is not bound: ")
    assert (event[1] if event else "no storage class is set") in found.text
    assert f"delete pvc {CLAIM}`, then set {value}.storageClass to" in found.remedy
    assert f"or {value}.enabled=false" in found.remedy


def test_claim_that_waits_for_its_pod(lab: Any) -> None:
    """With `WaitForFirstConsumer` a claim is pending because its pod is."""
    put_pod(lab, STORE, **pending("0/2 nodes are available: 2 Insufficient memory."))
    put_claim(lab, event=("WaitForFirstConsumer", "waiting for first consumer nope"))
    found = health(lab, STORE)
    assert found.text.startswith("0 of 1 pod ready: tita-s3-0: 0/2 nodes are available: 2 Insuff")
    assert found.remedy == "wait, or lower s3.embedded.resources in the release's values"


def container(**state: Any) -> dict[str, Any]:
    return {"phase": "Running", "containerStatuses": [{"name": "s3", "restartCount": 3} | state]}


@pytest.mark.parametrize(
    ("status", "mark", "words"),
    [
        (
            container(state={"waiting": {"reason": "ContainerCreating"}}),
            CheckStatus.UNKNOWN,
            "0 of 1 pod ready so far",
        ),
        (container(state={"waiting": {"reason": "ErrImagePull"}}), CheckStatus.BAD, "ErrImagePull"),
        (
            container(state={"running": {}}, lastState={"terminated": {"exitCode": 137}}),
            CheckStatus.BAD,
            "3 restarts, the last after exit code 137",
        ),
        (READY, CheckStatus.OK, "1 of 1 pod ready"),
        (SILENT, CheckStatus.BAD, "tita-s3-0: node node-1 does not report"),
    ],
)
def test_pod_that_is_not_ready(
    lab: Any, status: dict[str, Any], mark: CheckStatus, words: str
) -> None:
    put_claim(lab, phase="Bound")
    put_pod(lab, STORE, **status)
    found = health(lab, STORE)
    assert found.mark is mark
    assert words in found.text


def test_unschedulable_replica_beside_a_ready_one(lab: Any) -> None:
    """After `tita promote` on a full cluster, the old model would be served until a GPU is free."""
    put_claim(lab, phase="Bound")
    put_pod(lab, INFERENCE, **READY)
    put_pod(lab, INFERENCE, number=1, **pending("0/1 nodes: 1 Insufficient nvidia.com/gpu."))
    put_pod(lab, INFERENCE, number=2, phase="Failed", reason="Evicted")
    found = health(lab, INFERENCE)
    assert found.mark is CheckStatus.UNKNOWN
    assert found.text.startswith("1 of 2 pods ready: tita-inference-1: 0/1 nodes")
    assert "inference.strategy.type=Recreate" in found.remedy


def test_no_launch_while_the_store_is_down(lab: Any) -> None:
    template = find_template(lab.cluster, "train-dpo")
    manifest, _ = plan(LaunchRequest(job="train-dpo", run="r", recipe={}), template)
    told: list[str] = []

    def good() -> bool:
        return run_preflight(
            lab.cluster, template, manifest, report=lambda found: told.append(str(found))
        )

    assert good(), told
    put_pod(lab, INFERENCE, **UNBOUND)
    assert good(), "training does not need inference"
    put_pod(lab, STORE, **UNBOUND)
    put_claim(lab)
    assert not good()
    assert any(line.startswith("bad embedded store: 0 of 1 pod ready: claim") for line in told)


def test_forbidden_is_unknown(lab: Any) -> None:
    lab.api.denied.add(("list", "pods"))
    assert health(lab, STORE).mark is CheckStatus.UNKNOWN


def test_component_that_is_not_part_of_the_release(lab: Any) -> None:
    for component in (STORE, INFERENCE):
        found = health(lab, component, part_of_the_release=False)
        assert (found.mark, found.text) == (CheckStatus.OK, "not part of the release")


QUOTA = 'pods "tita-x" is forbidden: exceeded quota: gpus, requested: pods=1, limited: pods=0'


@pytest.mark.parametrize("component", [STORE, INFERENCE], ids=lambda c: c.label)
def test_component_without_pods_is_bad(lab: Any, component: Component) -> None:
    name = f"tita-{component.label}"
    found = health(lab, component)
    assert found.mark is CheckStatus.BAD
    assert found.text == f"{component.kind} {name} does not exist"
    assert "`{helm} upgrade tita charts/tita" in found.remedy

    put_workload(lab, component)
    found = health(lab, component)
    assert found.mark is CheckStatus.BAD
    assert found.text == f"{component.kind} {name} has 0 of 1 pod"
    assert f"describe {component.kind.lower()} {name}" in found.remedy

    put_workload(lab, component, replicas=0)
    found = health(lab, component)
    assert found.mark is CheckStatus.BAD
    assert "is scaled to 0" in found.text
    assert f"scale {component.kind.lower()} {name} --replicas 1" in found.remedy

    put_workload(lab, component)
    owner = {STORE: "", INFERENCE: "-5f6d"}[component]
    lab.api.event(f"{name}{owner}", "FailedCreate", QUOTA, kind="ReplicaSet")
    found = health(lab, component)
    assert found.mark is CheckStatus.BAD
    assert "exceeded quota: gpus" in found.text
    assert "ResourceQuota" in found.remedy


def test_paused_deployment_and_missing_replica(lab: Any) -> None:
    put_workload(lab, INFERENCE, spec={"paused": True})
    assert "it is paused" in health(lab, INFERENCE).text
    put_claim(lab, phase="Bound")
    put_pod(lab, INFERENCE, **READY)
    assert health(lab, INFERENCE).mark is CheckStatus.OK
    condition = {"type": "ReplicaFailure", "status": "True", "message": QUOTA}
    put_workload(lab, INFERENCE, replicas=2, status={"conditions": [condition]})
    found = health(lab, INFERENCE)
    assert found.mark is CheckStatus.UNKNOWN
    assert found.text.startswith("1 of 1 pod ready: Deployment tita-inference has 1 of 2 pods: ")
    assert "exceeded quota" in found.text


WORDS = "s3://tita/base: neither a complete tree nor a pointer; push it with tita data push"


def test_a_container_that_fails_is_quoted(lab: Any) -> None:
    """The back-off of the kubelet hides it: "back-off 5m0s restarting failed container"."""
    put_claim(lab, phase="Bound")
    ended = {"exitCode": 2, "reason": "Error", "message": f"loading base\n{WORDS}\n\n"}
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}
    put_pod(
        lab, INFERENCE,
        **container(state={"waiting": waiting}, lastState={"terminated": ended}),
    )  # fmt: skip
    found = health(lab, INFERENCE)
    assert found.mark is CheckStatus.BAD
    assert found.text.endswith(f"exit code 2: an error in the recipe or the data: {WORDS}")
    assert found.remedy == "", "the image is not the cause"


def test_a_container_that_ran_out_of_memory(lab: Any) -> None:
    put_claim(lab, phase="Bound")
    ended = {"exitCode": 137, "reason": "OOMKilled"}
    for component in (STORE, INFERENCE):
        put_pod(lab, component, **container(state={"running": {}}, lastState={"terminated": ended}))
        found = health(lab, component)
        assert found.remedy == f"raise {component.values}.resources.limits.memory"


@pytest.mark.parametrize("component", [STORE, INFERENCE], ids=lambda c: c.label)
@pytest.mark.parametrize(
    "message",
    [
        "0/2 nodes are available: 2 Insufficient cpu.",
        "0/2 nodes are available: 2 node(s) had untolerated taint {team: x}.",
        "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.",
        "pods is forbidden: failed quota: q: must specify limits.cpu",
        "maximum memory usage per Container is 1Gi",
        "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
    ],
)
def test_remedies_name_values_that_exist(lab: Any, component: Component, message: str) -> None:
    put_claim(lab, phase="Bound")
    put_pod(lab, component, **pending(message))
    found = health(lab, component)
    assert found.remedy
    assert "jobs." not in found.remedy


def test_a_claim_that_is_being_deleted(lab: Any) -> None:
    """`kubectl delete pvc` takes effect when the pod that uses the claim has ended."""
    put_claim(lab)
    claim = lab.api.get("persistentvolumeclaims", CLAIM)
    claim["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    lab.api.put("persistentvolumeclaims", claim)
    put_pod(lab, STORE, **UNBOUND)
    found = health(lab, STORE)
    assert f"claim {CLAIM} is being deleted" in found.text
    lab.api.remove("persistentvolumeclaims", CLAIM)
    found = health(lab, STORE)
    assert f"there is no claim {CLAIM!r}" in found.text
    assert "`{helm} upgrade tita charts/tita" in found.remedy


def test_no_permission_to_look_at_the_workload(lab: Any) -> None:
    lab.api.denied.add(("get", "statefulsets.apps"))
    assert health(lab, STORE).mark is CheckStatus.BAD
