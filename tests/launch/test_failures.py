"""Failures of runs: messages and exit codes."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tita.errors import ExitCode, TitaError
from tita.launch.display import live_lines, stages_line
from tita.records import RankStage, RunStages

FIGURES = {
    "loss": 0.5, "reward_margin": 0.2, "reward_accuracy": 0.75, "learning_rate": 1e-6,
    "samples_per_s": 3.0, "seconds_left": 20.0, "peak_memory_bytes": 1,
}  # fmt: skip


def test_memory_limit(lab: Any) -> None:
    (pod,) = lab.running()
    figures = '{"step": 1, "steps": 9, "loss": 1, "reward_margin": 0, "reward_accuracy": 0, '
    figures += '"learning_rate": 1, "samples_per_s": 1, "seconds_left": 1, "peak_memory_bytes": 1}'
    lab.api.write(pod, "loading", "step 1", *([f'{{"progress": {figures}}}'] * 15))
    lab.api.end_pod(pod, 137, reason="OOMKilled")
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    outcome = lab.outcome()
    assert outcome.code == ExitCode.FAILED
    assert "exit code 137: out of memory: the container's limit was reached" in lab.view.text
    assert "    step 1" in lab.view.said
    assert "progress" not in lab.view.text, "lines for programs tell a person nothing"
    assert "jobs.resources.limits.memory (now 64Gi)" in lab.view.text
    assert "no tries are left" in lab.view.text


def test_memory_limit_that_killed_a_worker(lab: Any) -> None:
    """The kernel killed a worker and not the container, so Kubernetes reports `Error`."""
    (pod,) = lab.running()
    error = "the kernel killed a worker because this pod reached its memory limit of 64.0 GiB"
    lab.api.end_pod(pod, 137, message=json.dumps({"exit_code": 137, "error": error}))
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    lab.outcome()
    assert f"ended with exit code 137: {error}" in lab.view.text
    assert "jobs.resources.limits.memory (now 64Gi)" in lab.view.text


def test_oomkilled_with_exit_code_5_is_not_out_of_memory(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.end_pod(pod, 5, reason="OOMKilled")
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    lab.outcome()
    assert "exit code 5: failed" in lab.view.text
    assert "memory" not in lab.view.text


@pytest.mark.parametrize(
    ("code", "words", "exit_code"),
    [
        (2, "an error in the recipe or the data", ExitCode.USER),
        (12, "out of device memory", ExitCode.FAILED),
        (1, "the job failed", ExitCode.FAILED),
        (70, "a rank hung", ExitCode.FAILED),
        (139, "segmentation fault", ExitCode.FAILED),
        (127, "the image has no such command", ExitCode.FAILED),
    ],
)
def test_exit_codes(lab: Any, code: int, words: str, exit_code: ExitCode) -> None:
    (pod,) = lab.running()
    lab.api.write(pod, "the last word")
    lab.api.end_pod(pod, code)
    lab.api.job_over("r", "Failed", reason="PodFailurePolicy")
    assert lab.outcome().code == exit_code
    assert f"exit code {code}: {words}" in lab.view.text
    assert "    the last word" in lab.view.said


def test_root_cause_rank_is_named(lab: Any) -> None:
    first, second = lab.running(nodes=2)
    lab.api.write(second, "CUDA error")
    lab.api.end_pod(first, 76)
    lab.api.end_pod(second, 139)
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    assert lab.outcome().pod == second
    assert "(rank 1, node-2)" in lab.view.text
    assert "    CUDA error" in lab.view.said


def test_retrying_reports_the_end_of_the_last_attempt(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.end_pod(pod, 75)
    lab.until(lambda: lab.view.phases[-1] == "retrying")
    status = lab.cli("jobs", "status", "r")
    assert "retrying" in status.stdout
    assert "exit code 75: preempted, or the store or network was unavailable" in status.stderr
    again = lab.api.pod("r", node="node-2", suffix="later")
    lab.until(lambda: lab.view.phases[-1] == "running")
    lab.api.end_pod(again, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    (told,) = [line for line in lab.view.said if "the next attempt starts" in line]
    assert told.startswith(f"pod {pod} (rank 0, node-1) ended with exit code 75")
    assert told.endswith("(not counted)")


def test_retry_is_reported_after_the_job_controller_counted_the_failure(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.end_pod(pod, 1)
    lab.until(lambda: lab.view.snapshots[-1].workers[0].state == "failed")
    assert lab.view.phases[-1] == "running"
    job = lab.api.get("jobs.batch", "r")
    lab.api.put("jobs.batch", job | {"status": {"failed": 1}})
    lab.until(lambda: lab.view.phases[-1] == "retrying")
    assert "(1 of 3 tries used)" in lab.view.text
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    assert lab.outcome().code == ExitCode.FAILED


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("The node was low on resource: ephemeral-storage", "a storage class in jobs.scratch"),
        ("The node was low on resource: memory. Container", "jobs.resources.requests.memory"),
        ('Container tita exceeded its local ephemeral storage limit "50Gi"', "raise ephemeral-"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 5Gi", "limits"),
        ("The node was low on resource: inodes", "free the node's disk"),
        ("The node had condition: [DiskPressure]", "free the node's disk"),
        ("The node was low on resource: pids", "cordon the node"),
        ("The node had condition: [MemoryPressure]", "jobs.resources.requests.memory"),
        ('Usage of EmptyDir volume "shm" exceeds the limit "8Gi"', "raise jobs.shmSize"),
        ('Usage of EmptyDir volume "scratch" exceeds the limit "200Gi"', "raise its size"),
    ],
)
def test_eviction(lab: Any, words: str, remedy: str) -> None:
    (pod,) = lab.running()
    lab.api.end_pod(pod, 143)
    lab.api.status(pod, reason="Evicted", message=words)
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    assert lab.outcome().code == ExitCode.FAILED
    assert f"was evicted: {words}; " in lab.view.text
    assert remedy in lab.view.text


def test_a_pod_that_the_kubelet_rejects(lab: Any) -> None:
    (pod,) = lab.running()
    words = "Pod was rejected: Allocate failed due to no healthy devices present"
    lab.api.status(pod, phase="Failed", reason="UnexpectedAdmissionError", message=words)
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    assert lab.outcome().code == ExitCode.FAILED
    assert f"failed: {words}; cordon the node until" in lab.view.text


def test_lost_node(lab: Any) -> None:
    (pod,) = lab.running()
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    message = "Taint manager: deleting due to NoExecute taint"
    lab.api.end_pod(pod, 137)
    lab.api.status(pod, conditions=[condition | {"message": message}])
    lab.until(lambda: lab.view.snapshots[-1].workers[0].state == "disrupted")
    again = lab.api.pod("r", node="node-2", suffix="later")
    lab.until(lambda: lab.view.snapshots[-1].workers[0].state == "running")
    assert lab.view.snapshots[-1].workers[0].restarts == 1
    lab.api.end_pod(again, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK


def test_deadline(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.write(pod, "still at it")
    lab.until(lambda: lab.view.lines)
    lab.api.job_over("r", "Failed", reason="DeadlineExceeded", message="Job was active too long")
    assert lab.outcome().code == ExitCode.FAILED
    assert "its deadline passed" in lab.view.text
    assert "raise jobs.perJob.train-dpo.activeDeadlineSeconds (now " in lab.view.text


def test_the_error_that_a_process_left_is_shown_instead_of_its_code(lab: Any) -> None:
    (pod,) = lab.running()
    error = "http://tita:8000/v1: not ready after 900 s (HTTP 503); check it with `tita doctor`"
    lab.api.end_pod(pod, 75, message=json.dumps({"exit_code": 75, "error": error}))
    lab.api.job_over("r", "Failed", reason="DeadlineExceeded", message="Job was active too long")
    outcome = lab.outcome()
    assert outcome.exit_code == 75
    assert "exit code 75: http://tita:8000/v1: not ready after 900 s (HTTP 503)" in lab.view.text
    assert "`tita doctor" in lab.view.text
    assert "store" not in lab.view.text


def test_job_deleted_by_someone_else(lab: Any) -> None:
    lab.running()
    lab.api.remove("jobs.batch", "r")
    assert lab.outcome().code == ExitCode.FAILED
    assert "was deleted while it ran" in lab.view.text


def test_job_deleted_during_an_outage(lab: Any) -> None:
    lab.running()
    lab.api.stop()
    lab.until(lambda: "does not answer" in lab.view.text)
    lab.api.remove("jobs.batch", "r")
    lab.api.compact()
    lab.api.start()
    assert lab.outcome().code == ExitCode.FAILED
    assert "was deleted while it ran" in lab.view.text


def test_api_outage(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.write(pod, "before")
    lab.until(lambda: lab.view.lines)
    lab.api.stop()
    lab.until(lambda: "does not answer" in lab.view.text)
    lab.api.write(pod, "meanwhile")
    lab.api.start()
    lab.until(lambda: "answers again" in lab.view.text)
    lab.api.write(pod, "after")
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert [text for _, text in lab.view.lines] == ["before", "meanwhile", "after"]
    assert sum("does not answer" in line for line in lab.view.said) == 1


def test_missing_run(lab: Any) -> None:
    lab.watch("nobody")
    with pytest.raises(TitaError, match="no run 'nobody'"):
        lab.outcome()


def test_watching_is_forbidden(lab: Any) -> None:
    lab.submit()
    lab.api.denied.add(("list", "jobs.batch"))
    lab.watch()
    with pytest.raises(TitaError, match=r"rbac\.subjects"):
        lab.outcome()


def test_progress_is_displayed(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.write(pod, json.dumps({"progress": {"step": 5, "steps": 10, **FIGURES}}))
    lab.until(lambda: lab.view.phases[-1] == "training")
    lab.api.write(pod, json.dumps({"progress": {"step": 10, "steps": 10, **FIGURES}}))
    lab.until(lambda: lab.view.phases[-1] == "uploading")
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert lab.view.lines == []


LOADING = RankStage(name="loading the model", ranks=(0, 1))


def stages(*found: RankStage) -> str:
    return RunStages(stages=found, ranks_per_node=1).to_line()


def test_what_the_ranks_do_before_the_first_step_is_displayed(lab: Any) -> None:
    pod, other = lab.running(nodes=2)
    pull = RankStage(name="pull", ranks=(0, 1), done=5 << 20, total=20 << 20, unit="bytes")
    lab.api.write(pod, stages(pull))
    lab.until(lambda: lab.view.snapshots[-1].stages is not None)
    assert stages_line(lab.view.snapshots[-1].stages) == "pull: 5/20 MiB"
    slow = replace(pull, ranks=(1,))
    lab.api.write(pod, stages(replace(LOADING, ranks=(0,)), slow))
    lab.until(lambda: len(lab.view.snapshots[-1].stages.stages) == 2)
    snapshot = lab.view.snapshots[-1]
    assert stages_line(snapshot.stages) == "rank 0: loading the model; rank 1: pull: 5/20 MiB"
    assert [line[48:] for line in live_lines(snapshot)[2:]] == [
        "loading the model",
        "pull: 5/20 MiB",
    ]
    assert lab.view.phases[-1] == "running"
    status = lab.cli("jobs", "status", "r")
    assert "rank 0: loading the model; rank 1: pull: 5/20 MiB" in status.stdout + status.stderr
    now = lab.cli("jobs", "logs", "r", "--no-follow")
    assert now.stdout.splitlines() == [
        "pull: 5/20 MiB",
        "rank 0: loading the model; rank 1: pull: 5/20 MiB",
    ]
    lab.api.write(pod, stages(RankStage(name="training", ranks=(0, 1))))
    lab.until(lambda: lab.view.phases[-1] == "training")
    for each in (pod, other):
        lab.api.end_pod(each, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert lab.view.lines == []


def test_a_retry_begins_without_the_progress_of_the_attempt_before(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.write(pod, json.dumps({"progress": {"step": 5, "steps": 10, **FIGURES}}))
    lab.until(lambda: lab.view.phases[-1] == "training")
    lab.api.end_pod(pod, 75)
    lab.until(lambda: lab.view.phases[-1] == "retrying")
    again = lab.api.pod("r", node="node-2", suffix="later")
    lab.until(lambda: lab.view.phases[-1] == "running")
    assert lab.view.snapshots[-1].progress is None
    lab.api.write(again, stages(LOADING))
    lab.until(lambda: lab.view.snapshots[-1].stages is not None)
    assert lab.view.phases[-1] == "running"
    lab.api.write(again, json.dumps({"progress": {"step": 6, "steps": 10, **FIGURES}}))
    lab.until(lambda: lab.view.phases[-1] == "training")
    lab.api.end_pod(again, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
