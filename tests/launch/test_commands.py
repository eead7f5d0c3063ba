"""`tita launch` and `tita jobs` as processes: what they print, and their exit codes."""

import json
from typing import Any

from tita.errors import ExitCode


def test_command_refuses_before_it_asks(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--set", "betta=0.2")
    assert done.returncode == ExitCode.USER
    assert "did you mean 'beta'" in done.stderr


def test_command_prints_the_job(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--gpus", "8", "--dry-run", "-o", "json", "--name", "x")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"]["parallelism"] == 2
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_command_says_why_it_does_not_submit(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--gpus", "8", "--nodes", "1", "--detach")
    assert done.returncode == ExitCode.USER
    assert "0 of 2 nodes can hold a pod with 8 GPUs; the largest has 4" in done.stderr
    assert "not submitted" in done.stderr
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_command_without_a_cluster(lab: Any) -> None:
    lab.api.stop()
    typo = lab.cli("launch", "trian-dpo")
    assert typo.returncode == ExitCode.USER, "told before anything is asked"
    assert (
        "no job named 'trian-dpo'; choose one of benchmark, build-pairs, train-dpo" in typo.stderr
    )
    done = lab.cli("jobs", "list")
    assert done.returncode == ExitCode.UNREACHABLE
    assert "does not answer" in done.stderr


def test_jobs_are_listed_shown_cancelled_and_deleted(lab: Any) -> None:
    made = lab.cli("launch", "train-dpo", "--name", "one", "--detach", "-o", "json")
    assert json.loads(made.stdout) == {"run": "one", "job": "train-dpo", "namespace": "lab"}
    listed = json.loads(lab.cli("jobs", "list", "-o", "json").stdout)
    assert [(row["run"], row["job"]) for row in listed] == [("one", "train-dpo")]
    pod = lab.api.pod("one")
    lab.api.waiting(pod, "ErrImagePull", "denied")
    shown = lab.cli("jobs", "status", "one")
    assert "ErrImagePull" in shown.stdout + shown.stderr
    assert lab.cli("jobs", "cancel", "one").returncode == 0
    assert lab.api.get("jobs.batch", "one")["spec"]["activeDeadlineSeconds"] == 1
    lab.api.job_over("one", "Failed", reason="DeadlineExceeded")
    shown = lab.cli("jobs", "status", "one")
    assert "one was cancelled" in shown.stderr
    assert "activeDeadlineSeconds" not in shown.stderr
    assert " cancelled " in shown.stdout
    assert " cancelled " in lab.cli("jobs", "list").stdout
    assert lab.cli("jobs", "delete", "one").returncode == 0
    assert lab.cli("jobs", "status", "one").returncode == ExitCode.USER


def test_a_run_that_may_not_be_watched_is_not_taken_for_one_that_was_not_launched(lab: Any) -> None:
    lab.api.denied.add(("list", "jobs.batch"))
    done = lab.cli("launch", "train-dpo", "--name", "one", "--no-preflight")
    assert done.returncode == ExitCode.USER
    assert "submitted one" in done.stderr
    assert "cannot watch one, which continues: jobs.batch is forbidden" in done.stderr
    assert lab.api.get("jobs.batch", "one")


def test_list_keeps_names_in_one_piece_on_80_columns(lab: Any) -> None:
    longest = "n" * 57
    for run in ("train-dpo-20261124-093015-k3f", longest):
        lab.submit(run)
    lab.api.job_over("train-dpo-20261124-093015-k3f", "Failed", reason="PodFailurePolicy")
    rows = [line.split() for line in lab.cli("jobs", "list").stdout.splitlines()]
    assert ["train-dpo-20261124-093015-k3f", "train-dpo", "failed", "0/1"] in [r[:4] for r in rows]
    assert [longest, "train-dpo", "scheduling", "0/1"] in [r[:4] for r in rows]
