"""Health of the release's embedded store and inference."""

from typing import Any

import pytest

from tita.launch.doctor import INFERENCE, STORE, component_health, run_preflight
from tita.launch.preflight import CheckStatus
from tita.launch.submit import LaunchRequest, find_template, plan

CLAIM = "data-of-tita"


READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}

SILENT = {
    "phase": "Running",
    "conditions": [
        {"type": "Ready", "status": "False"},
        {"type": "ContainersReady", "status": "True"},
    ],
}


def put_pod(lab: Any, component: str, *, number: int = 0, **status: Any) -> None:
    labels = {"app.kubernetes.io/instance": "tita", "app.kubernetes.io/component": component}
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}}]
    item = {"metadata": {"name": f"tita-{component}-{number}", "labels": labels}, "status": status}
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
def test_unbound_claim(lab: Any, component: str, value: str, event: tuple[str, str] | None) -> None:
    put_pod(lab, component, **UNBOUND)
    put_claim(lab, event=event)
    found = component_health(lab.cluster, "tita", component)
    assert found.mark is CheckStatus.BAD
    assert found.text.startswith(f"0 of 1 pod ready: claim {CLAIM} is not bound: ")
    assert (event[1] if event else "no storage class is set") in found.text
    assert f"set {value}.storageClass to" in found.remedy
    assert f"or {value}.enabled=false" in found.remedy


def test_claim_that_waits_for_its_pod(lab: Any) -> None:
    """With `WaitForFirstConsumer` a claim is pending because its pod is."""
    put_pod(lab, STORE, **pending("0/2 nodes are available: 2 Insufficient memory."))
    put_claim(lab, event=("WaitForFirstConsumer", "waiting for first consumer nope"))
    found = component_health(lab.cluster, "tita", STORE)
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
    found = component_health(lab.cluster, "tita", STORE)
    assert found.mark is mark
    assert words in found.text


def test_unschedulable_replica_beside_a_ready_one(lab: Any) -> None:
    """After `tita promote` on a full cluster, the old model would be served until a GPU is free."""
    put_claim(lab, phase="Bound")
    put_pod(lab, INFERENCE, **READY)
    put_pod(lab, INFERENCE, number=1, **pending("0/1 nodes: 1 Insufficient nvidia.com/gpu."))
    put_pod(lab, INFERENCE, number=2, phase="Failed", reason="Evicted")
    found = component_health(lab.cluster, "tita", INFERENCE)
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
    assert component_health(lab.cluster, "tita", STORE).mark is CheckStatus.UNKNOWN
