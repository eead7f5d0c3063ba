"""Retries and terminations in progress: each is reported once, in the right phase."""

import threading
import time
from typing import Any

import pytest

from tita.errors import ExitCode, TitaError
from tita.launch.jobs import cancel, delete, list_jobs, read_status
from tita.launch.reasons import retry_reason
from tita.launch.run_state import RunPhase
from tita.launch.submit import LaunchRequest, find_template, plan, submit

JOB = {"metadata": {"name": "r"}, "spec": {"backoffLimit": 9}, "status": {"failed": 9}}


def ended_pods(codes: list[int], *, seconds_ago: float) -> list[dict[str, Any]]:
    """Pods of rank 0 that ended every 30 s, the last `seconds_ago`."""
    pods = []
    for number, code in enumerate(codes):
        then = time.time() - seconds_ago - 30.0 * (len(codes) - 1 - number)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(then))
        state = {"terminated": {"exitCode": code, "finishedAt": stamp}}
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "tita", "state": state}],
        }
        metadata = {"name": f"r-0-{number}", "creationTimestamp": stamp}
        pods.append({"metadata": metadata, "spec": {}, "status": status})
    return pods


@pytest.mark.parametrize(
    ("codes", "seconds"),
    [([1], 10), ([1, 75], 20), ([1, 1, 1], 40), ([75] * 7, 600), ([1, 1, 0, 1], 10)],
)
def test_retry_time(codes: list[int], seconds: int) -> None:
    """The delay doubles for each failed pod since the last success, counted or not, at most.

    Seen on Kubernetes 1.36: 10 s after one pod, 20 s after two, of one try or of two; but 40 s
    after four, of which the Job ignored one.
    """
    found = retry_reason(JOB, ended_pods(codes, seconds_ago=4.0))
    assert found is not None
    left = int(found.text.split("starts within ")[1].split(" s (")[0])
    assert seconds - 6 <= left <= seconds - 4
    late = retry_reason(JOB, ended_pods(codes, seconds_ago=1000.0))
    assert late is not None
    assert "starts at any moment" in late.text


def phase(lab: Any) -> str:
    """The run's phase in list and status."""
    (row,) = list_jobs(lab.cluster)
    assert row["phase"] == read_status(lab.cluster, "r")["phase"]
    return str(row["phase"])


def test_cancelled_run_while_its_pods_end(lab: Any) -> None:
    (pod,) = lab.running()
    cancel(lab.cluster, "r")
    assert phase(lab) == RunPhase.CANCELLING
    assert read_status(lab.cluster, "r")["told"] == [
        "cancelled; its pods have 600 s to save and exit"
    ]
    lab.until(lambda: lab.view.phases[-1] == "cancelling")
    lab.api.end_pod(pod, 75)
    lab.api.remove("pods", pod)
    lab.api.job_over("r", "Failed", reason="DeadlineExceeded")
    assert lab.outcome().code == ExitCode.FAILED
    assert lab.view.phases == ["running", "cancelling", "cancelled"]
    assert sum("cancelled; its pods" in line for line in lab.view.said) == 1
    # The Job's controller deletes the pods of a Job whose deadline passed.
    assert "its pods are deleted, and their logs with them" in lab.view.text
    assert "tita jobs logs" not in lab.view.text
    assert "its pods are deleted" in " ".join(read_status(lab.cluster, "r")["told"])


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        (
            "FailureTarget",
            "PodFailurePolicy",
            "failed: a retry would fail the same way (pod r-1-",
        ),
        ("SuccessCriteriaMet", "SuccessPolicy", "rank 0 is done; its pods have"),
    ],
)
def test_decided_outcome_is_reported_before_all_pods_ended(
    lab: Any, kind: str, reason: str, words: str
) -> None:
    _, second = lab.running(nodes=2)
    lab.api.end_pod(second, 2)
    job = lab.api.get("jobs.batch", "r")
    condition = {"type": kind, "status": "True", "reason": reason}
    lab.api.put("jobs.batch", job | {"status": {"failed": 1, "conditions": [condition]}})
    lab.until(lambda: lab.view.phases[-1] == "ending")
    assert phase(lab) == RunPhase.ENDING
    assert words in lab.view.text
    over = "Complete" if kind == "SuccessCriteriaMet" else "Failed"
    lab.api.job_over("r", over, reason=reason)
    lab.outcome()


def test_node_that_stops_reporting(lab: Any) -> None:
    first, second = lab.running(nodes=2)
    # The status that the node controller sets when the kubelet stops reporting.
    ready = {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    lab.api.status(second, conditions=[ready, {"type": "ContainersReady", "status": "True"}])
    lab.until(lambda: lab.view.snapshots[-1].workers[1].state == "lost")
    job = lab.api.get("jobs.batch", "r")
    lab.api.put("jobs.batch", job | {"metadata": job["metadata"] | {"deletionTimestamp": "now"}})
    told = read_status(lab.cluster, "r")["told"]
    assert told[0].startswith("deleted; "), "deletion waits for the node"
    assert "does not report" in told[1]
    lab.api.put("jobs.batch", job)
    lab.until(lambda: "does not report" in lab.view.text)
    assert "kubectl delete node node-2" in lab.view.text
    assert lab.view.snapshots[-1].workers[0].state == "running"
    gone = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}
    lab.api.status(second, phase="Failed", conditions=[ready, gone | {"message": "PodGC: no node"}])
    lab.until(lambda: "PodGC: no node; it is replaced" in lab.view.text)
    lab.api.pod("r", 1, node="node-1", suffix="later")
    lab.api.end_pod(first, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert sum("does not report" in line for line in lab.view.said) == 1


def test_evicted_pod_while_others_continue(lab: Any) -> None:
    first, second = lab.running(nodes=2)
    message = "Eviction API: evicting"
    drained = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    lab.api.status(second, conditions=[drained | {"message": message}])
    lab.until(lambda: message in lab.view.text)
    lab.api.remove("pods", second)
    lab.api.pod("r", 1, node="node-1", suffix="later")
    lab.until(lambda: len(lab.view.snapshots[-1].workers) == 2)
    lab.api.end_pod(first, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    told = f"pod {second} (rank 1, node-2) was disrupted: {message}; it is replaced"
    assert lab.view.said.count(told) == 1


def test_failed_rank_while_others_continue(lab: Any) -> None:
    first, second = lab.running(nodes=2)
    lab.api.end_pod(second, 1)
    told = f"pod {second} (rank 1, node-2) ended with exit code 1: the job failed"
    lab.until(lambda: told in lab.view.said)
    lab.api.pod("r", 1, node="node-1", suffix="later")
    lab.until(lambda: lab.view.snapshots[-1].workers[1].restarts == 1)
    lab.api.end_pod(first, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert lab.view.said.count(told) == 1


def test_name_of_a_deleted_run_is_taken_until_its_pods_ended(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.slow_to_end = True
    said: list[str] = []
    deleting = threading.Thread(
        target=delete, args=(lab.cluster, "r"), kwargs={"notify": said.append}
    )
    deleting.start()
    lab.until(lambda: lab.view.phases[-1] == "ending")
    manifest, _ = plan(
        LaunchRequest(job="train-dpo", run="r", recipe={}), find_template(lab.cluster, "train-dpo")
    )
    with pytest.raises(TitaError, match="its pods are still terminating"):
        submit(lab.cluster, manifest)
    lab.until(lambda: said)
    assert deleting.is_alive()
    lab.api.end_pod(pod, 75)
    lab.api.remove("jobs.batch", "r")
    deleting.join(timeout=10)
    assert not deleting.is_alive()
    lab.outcome()
    submit(lab.cluster, manifest)
