"""Reasons for waiting: each is reported once, in the cluster's words, with a remedy."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from tita.errors import ExitCode
from tita.launch.jobs import read_status

MORE_NEEDED = "insufficient unused quota for nvidia.com/gpu, {} more needed"


def done_after_waiting(lab: Any, pod: str, words: str) -> None:
    """The reason was reported once, and the run succeeds."""
    lab.until(lambda: words in lab.view.text)
    lab.api.run_pod(pod)
    lab.until(lambda: lab.view.phases[-1] == "running")
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    outcome = lab.outcome()
    assert outcome.code == ExitCode.OK
    assert sum(words in line for line in lab.view.said) == 1


def test_unschedulable(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    search = "no new claims to deallocate, preemption: 0/2 nodes are available: 2 No victims."
    lab.api.unschedulable(pod, f"0/2 nodes are available: 2 Insufficient nvidia.com/gpu. {search}")
    view = lab.watch()
    lab.until(lambda: "2 Insufficient nvidia.com/gpu; use" in view.text)
    assert "use fewer with --gpus" in view.text
    assert view.phases == ["scheduling"]
    # The same cause with other numbers is not reported again.
    lab.api.unschedulable(pod, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    done_after_waiting(lab, pod, "Insufficient nvidia.com/gpu")


def test_taints(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    lab.api.unschedulable(pod, "0/2 nodes are available: 2 node(s) had untolerated taint {a: b}.")
    lab.watch()
    done_after_waiting(lab, pod, "untolerated taint {a: b}")
    assert "jobs.tolerations" in lab.view.text


def test_unbound_volumes(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    lab.api.unschedulable(
        pod, "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."
    )
    lab.watch()
    done_after_waiting(lab, pod, "unbound immediate PersistentVolumeClaims")
    assert "kubectl get pvc" in lab.view.text


def test_missing_storage_class(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    words = 'storageclass.storage.k8s.io "nope" not found'
    lab.api.event(f"{pod}-scratch", "ProvisioningFailed", words, kind="PersistentVolumeClaim")
    lab.api.unschedulable(pod, "0/2 nodes: pod has unbound immediate PersistentVolumeClaims.")
    lab.watch()
    done_after_waiting(lab, pod, f"a pod waits: no volume for its scratch: {words}; set one of")


def test_missing_image(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    lab.api.waiting(pod, "ErrImagePull", "tita:9: not found")
    lab.watch()
    lab.until(lambda: "ErrImagePull: tita:9: not found" in lab.view.text)
    assert "check that the image and its tag exist" in lab.view.text
    lab.api.waiting(pod, "ImagePullBackOff", 'Back-off pulling image "tita:9"')
    done_after_waiting(lab, pod, "ImagePullBackOff")


def test_invalid_image_name(lab: Any) -> None:
    lab.submit(image="Not An Image")
    pod = lab.api.pod("r")
    lab.api.waiting(pod, "InvalidImageName", "couldn't parse image name")
    lab.watch()
    done_after_waiting(lab, pod, "InvalidImageName")
    assert "fix --image" in lab.view.text


def test_missing_secret(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    lab.api.waiting(pod, "CreateContainerConfigError", 'secret "s3-keys" not found')
    lab.watch()
    done_after_waiting(lab, pod, 'secret "s3-keys" not found')
    assert "create the secret" in lab.view.text


def test_missing_volume(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r")
    lab.api.waiting(pod, "ContainerCreating")
    lab.api.event(pod, "FailedMount", 'MountVolume.SetUp failed: configmap "ca" not found')
    lab.watch()
    done_after_waiting(lab, pod, 'configmap "ca" not found')


def test_exceeded_quota(lab: Any) -> None:
    lab.submit()
    words = 'pods "r-0-x" is forbidden: exceeded quota: gpus, requested: 4, limited: 2'
    lab.api.event("r", "FailedCreate", words, kind="Job")
    lab.watch()
    lab.until(lambda: "exceeded quota" in lab.view.text)
    assert "ResourceQuota" in lab.view.text
    # The Job's controller tries again and again, and every pod that it cannot make has a new name.
    lab.api.event("r", "FailedCreate", words.replace("r-0-x", "r-0-y"), kind="Job")
    lab.until(lambda: "r-0-y" in lab.view.snapshots[-1].reasons[0].text)
    done_after_waiting(lab, lab.api.pod("r"), "exceeded quota")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("failed quota: q: must specify limits.cpu for: tita", "the namespace's quota requires"),
        ("maximum memory usage per Container is 16Gi, but limit is 64Gi", "LimitRange"),
    ],
)
def test_namespace_limits(lab: Any, words: str, remedy: str) -> None:
    lab.submit()
    lab.api.event("r", "FailedCreate", f'pods "r-0-x" is forbidden: {words}', kind="Job")
    lab.watch()
    lab.until(lambda: remedy in lab.view.text)
    done_after_waiting(lab, lab.api.pod("r"), words)


def test_pod_security(lab: Any) -> None:
    lab.submit()
    words = 'pods "r-0-x" is forbidden: violates PodSecurity "restricted:latest"'
    lab.api.event("r", "FailedCreate", words, kind="Job")
    lab.watch()
    lab.until(lambda: "violates PodSecurity" in lab.view.text)
    done_after_waiting(lab, lab.api.pod("r"), "violates PodSecurity")


def test_missing_service_account(lab: Any) -> None:
    lab.submit()
    words = 'error looking up service account lab/tita: serviceaccount "tita" not found'
    lab.api.event("r", "FailedCreate", words, kind="Job")
    lab.watch()
    lab.until(lambda: 'serviceaccount "tita" not found' in lab.view.text)
    assert "serviceAccount.create" in lab.view.text
    done_after_waiting(lab, lab.api.pod("r"), 'serviceaccount "tita" not found')


def test_queue_position(lab: Any) -> None:
    lab.submit(queue="gpus")
    uid = lab.api.get("jobs.batch", "r")["metadata"]["uid"]
    for name, stamp, owner in (
        ("a", "2026-01-01T00:00:00Z", "x"),
        ("b", "2026-01-02T00:00:00Z", uid),
    ):
        metadata = {"name": name, "creationTimestamp": stamp, "ownerReferences": [{"uid": owner}]}
        item = {"metadata": metadata, "spec": {"queueName": "gpus"}}
        lab.api.put("workloads.kueue.x-k8s.io", item)
    tell_quota(lab, "b", MORE_NEEDED.format(4))
    lab.watch()
    lab.until(lambda: "position 2: insufficient unused quota" in lab.view.text)
    assert lab.view.phases == ["queued"]
    # Other amounts are not reported again; a new position and an eviction are.
    tell_quota(lab, "b", MORE_NEEDED.format(2))
    polls = num_polls(lab)
    lab.until(lambda: num_polls(lab) > polls + 1)
    lab.api.remove("workloads.kueue.x-k8s.io", "a")
    lab.until(lambda: "position 1: insufficient unused quota" in lab.view.text)
    assert "4 more needed" in lab.view.text
    assert sum("insufficient unused quota" in line for line in lab.view.said) == 2
    told = read_status(lab.cluster, "r")["told"]
    assert told == ["waits in queue gpus at position 1: " + MORE_NEEDED.format(2)]
    evicted = {"type": "Evicted", "status": "True", "message": "Preempted by a higher priority"}
    tell_quota(lab, "b", "insufficient unused quota", evicted)
    lab.until(lambda: "position 1: Preempted by a higher priority: insuff" in lab.view.text)
    job = lab.api.get("jobs.batch", "r")
    job["spec"]["suspend"] = False
    lab.api.put("jobs.batch", job)
    lab.api.end_pod(lab.api.pod("r", node="node-1"), 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK


def test_run_evicted_by_kueue(lab: Any) -> None:
    """Seen with Kueue's controller: it suspends the Job, whose pods then end by SIGTERM."""
    lab.submit(queue="gpus")
    job = lab.api.get("jobs.batch", "r")
    owner = {"ownerReferences": [{"uid": job["metadata"]["uid"]}]}
    metadata = {"name": "w", "creationTimestamp": "2026-01-01T00:00:00Z"} | owner
    lab.api.put("workloads.kueue.x-k8s.io", {"metadata": metadata, "spec": {"queueName": "gpus"}})
    words = "The workload is deactivated"
    tell_quota(lab, "w", words, {"type": "Evicted", "status": "True", "message": words})
    lab.api.end_pod(lab.api.pod("r", node="node-1"), 143)
    status = read_status(lab.cluster, "r")
    assert status["phase"] == "queued"
    assert status["told"] == [f"waits in queue gpus at position 1: {words}"]
    job["spec"]["suspend"] = False
    lab.api.put("jobs.batch", job | {"status": {"startTime": "2126-01-01T00:00:00Z"}})
    assert read_status(lab.cluster, "r")["phase"] != "retrying", "the pod is of an earlier life"


def num_polls(lab: Any) -> int:
    """Number of list requests for Kueue's workloads."""
    return sum("/workloads" in line for line in list(lab.api.requests))


def tell_quota(lab: Any, workload: str, words: str, *more: Any) -> None:
    """Kueue's condition of a waiting Workload."""
    item = lab.api.get("workloads.kueue.x-k8s.io", workload)
    waits = {"type": "QuotaReserved", "status": "False", "message": words}
    item["status"] = {"conditions": [waits, *more]}
    lab.api.put("workloads.kueue.x-k8s.io", item)


@pytest.mark.parametrize(
    ("resource", "own", "others"),
    [
        ("nvidia.com/gpu", "4 GPUs", "GPUs"),
        ("nvidia.com/mig-1g.10gb", "4 nvidia.com/mig-1g.10gb", "nvidia.com/mig-1g.10gb"),
        ("amd.com/gpu", "4 GPUs", "GPUs"),
    ],
)
def test_half_placed_gang_says_which_runs_hold_gpus(
    lab: Any, resource: str, own: str, others: str
) -> None:
    for run, gpus in (("r", 8), ("other", 4)):
        lab.submit(run, gpus=gpus)
    placed = [lab.api.pod("r", 0, node="node-1"), lab.api.pod("other", 0, node="node-2")]
    for pod in placed:
        item = lab.api.get("pods", pod)
        limits = {"limits": {resource: "4", "memory": "64Gi"}}
        item["spec"]["containers"][0]["resources"] = limits
        lab.api.put("pods", item)
    waiting = lab.api.pod("r", 1)
    lab.api.unschedulable(waiting, f"0/2 nodes are available: 2 Insufficient {resource}.")
    lab.watch()
    words = f"{others} that other runs of this namespace hold: other 4"
    lab.until(lambda: words in lab.view.text)
    assert f"r already holds {own}, which it frees" in lab.view.text
    assert "use fewer with --gpus" in lab.view.text
    lab.api.end_pod(placed[0], 14)
    lab.api.job_over("r", "Failed", reason="PodFailurePolicy")
    assert lab.outcome().code == ExitCode.FAILED
    assert "exit code 14: not all nodes of the gang started in time" in lab.view.text
    assert "--queue" in lab.view.text


def test_gang_timeout_reaches_the_pods(lab: Any) -> None:
    lab.submit("r", gang_timeout=90)
    job = lab.api.get("jobs.batch", "r")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "TITA_RENDEZVOUS_TIMEOUT_S", "value": "90"} in container["env"]


@pytest.mark.parametrize("code", [0, 76])
def test_a_sidecar_that_keeps_a_pod_running(lab: Any, code: int) -> None:
    """A mesh adds a container to pods, which runs on when the job has ended."""
    lab.submit()
    pod = lab.api.pod("r", node="node-1")
    view = lab.watch()
    lab.until(lambda: view.phases[-1:] == ["running"])
    mesh = {"name": "istio-proxy", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    for ended, is_stuck in ((time.time(), False), (time.time() - 100, True)):
        assert "istio-proxy" not in view.text
        stamp = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        state = {"terminated": {"exitCode": code, "reason": "", "finishedAt": stamp}}
        lab.api.status(pod, containerStatuses=[{"name": "tita", "state": state}, mesh])
        seen = len(view.snapshots)
        lab.until(lambda seen=seen: len(view.snapshots) > seen + 2)
        if is_stuck:
            lab.until(lambda: "istio-proxy keeps 1 pod running (r-0-abcde)" in view.text)
    assert "disable sidecars in jobs.podLabels" in view.text
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
