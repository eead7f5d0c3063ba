"""`tita jobs list` and `tita jobs status`: phase and elapsed time."""

import re
from pathlib import Path
from typing import Any

import pytest

from tita.launch.display import age
from tita.launch.jobs import list_jobs, list_names, read_status
from tita.launch.run_state import RunPhase


def told(lab: Any, run: str = "r") -> str:
    """The run's phase in list and status."""
    (listed,) = [row for row in list_jobs(lab.cluster) if row["run"] == run]
    assert listed["phase"] == read_status(lab.cluster, run)["phase"]
    return str(listed["phase"])


def test_list_and_status_name_one_phase(lab: Any) -> None:
    lab.submit()
    lab.submit("other")
    lab.api.pod("other", node="node-2")
    assert told(lab) == RunPhase.SCHEDULING
    assert told(lab, "other") == RunPhase.RUNNING
    pod = lab.api.pod("r")
    lab.api.waiting(pod, "ContainerCreating")
    assert told(lab) == RunPhase.STARTING
    lab.api.event(pod, "Pulling", "pulling the image")
    assert told(lab) == RunPhase.PULLING
    lab.api.run_pod(pod)
    assert told(lab) == RunPhase.RUNNING
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert told(lab) == RunPhase.DONE


def test_list_shows_failure_reason(lab: Any) -> None:
    lab.submit()
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    assert told(lab) == RunPhase.FAILED
    (row,) = list_jobs(lab.cluster)
    assert row["why"] == "no tries are left"


def test_listing_finished_runs_takes_one_request(lab: Any) -> None:
    lab.submit()
    lab.api.job_over("r", "Complete")
    lab.api.requests.clear()
    list_jobs(lab.cluster)
    assert len(lab.api.requests) == 1
    lab.submit("other")
    lab.api.requests.clear()
    assert set(list_names(lab.cluster)) == {"r", "other"}
    assert len(lab.api.requests) == 1


def test_every_phase_is_documented() -> None:
    document = (Path(__file__).parents[2] / "docs" / "launching.md").read_text()
    (table,) = re.findall(r"\| phase \|.*?\n\n", document, re.DOTALL)
    assert {str(phase) for phase in RunPhase} == set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("end", ["Complete", "Failed"])
def test_elapsed_time_stops_at_the_end(lab: Any, end: str) -> None:
    lab.submit()
    lab.api.job_over("r", end)
    job = lab.api.get("jobs.batch", "r")
    job["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    (condition,) = job["status"]["conditions"]
    condition["lastTransitionTime"] = "2026-01-01T00:01:30Z"
    if end == "Complete":
        job["status"]["completionTime"] = "2026-01-01T00:01:30Z"
    lab.api.put("jobs.batch", job)
    assert read_status(lab.cluster, "r")["seconds"] == 90


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0s"), (5.7, "5s"), (119, "119s"), (7000, "116m"), (90000, "25h"), (10**6, "11d")],
)
def test_age(seconds: float, words: str) -> None:
    assert age(seconds) == words
