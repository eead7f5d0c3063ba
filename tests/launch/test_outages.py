"""An API that freezes, throttles, or is unreachable while the machine sleeps."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_api import Refusal

from tita.errors import ExitCode, Unreachable
from tita.launch.cluster import Cluster, RetryPolicy
from tita.launch.submit import find_template
from tita.launch.watch import Informer

QUICK = RetryPolicy(attempts=3, first_wait_s=0.05, timeout_s=0.4, total_s=1.5)


@pytest.fixture(autouse=True)
def thawed(lab: Any) -> Iterator[None]:
    yield
    lab.api.thaw()


def test_frozen_api_times_out_after_a_notice(lab: Any) -> None:
    """It accepts connections and never answers: only read timeouts end the call."""
    told: list[str] = []
    retry = RetryPolicy(
        attempts=9, first_wait_s=0.05, timeout_s=0.4, total_s=1.5, notify=told.append
    )
    lab.api.freeze()
    with pytest.raises(Unreachable, match="does not answer") as caught:
        find_template(Cluster(lab.cluster.access, retry=retry), "train-dpo")
    assert caught.value.exit_code == ExitCode.UNREACHABLE
    assert len(told) == 1
    assert told[0].endswith("trying again")
    assert len(lab.api.requests) < 9, "its seconds are bounded, not only its tries"


def test_watch_that_always_expires_is_not_asked_in_a_tight_loop(lab: Any) -> None:
    lab.api.watch_refusals += [Refusal(410, "Expired", "too old resource version")] * 1000
    informer = Informer(
        lab.cluster.without_retries(), "pods", params={}, sink=lambda _: None, wait_s=(0.1, 0.4)
    )
    began = time.monotonic()
    informer.start()
    lab.until(lambda: len(lab.api.watch_refusals) <= 996)
    # The waits between the first four; each may be a fifth shorter.
    assert time.monotonic() - began > 0.8 * (0.1 + 0.2 + 0.4)
    informer.stop()


def test_watch_of_a_frozen_api_ends_unreachable(lab: Any) -> None:
    lab.submit()
    lab.cluster = Cluster(lab.cluster.access, retry=QUICK)
    lab.api.freeze()
    lab.watch()
    with pytest.raises(Unreachable):
        lab.outcome()


def test_api_that_freezes_during_a_watch(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.launch.cluster.SILENCE_S", 0.5)
    monkeypatch.setattr("tita.launch.watch.SILENCE_S", 0.5)
    lab.submit()
    pod = lab.api.pod("r", node="node-1")
    # Until it answers again.
    patient = RetryPolicy(attempts=1000, first_wait_s=0.05, timeout_s=0.4, total_s=100)
    lab.cluster = Cluster(lab.cluster.access, retry=patient)
    lab.watch()
    lab.api.write(pod, "before")
    lab.until(lambda: lab.view.lines)
    lab.api.freeze()
    lab.until(lambda: "does not answer" in lab.view.text)
    lab.api.write(pod, "meanwhile")
    lab.api.end_pod(pod, 0)
    lab.api.thaw()
    lab.until(lambda: "answers again" in lab.view.text)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert [text for _, text in lab.view.lines] == ["before", "meanwhile"]


def test_throttled_watches_are_reopened(lab: Any) -> None:
    lab.submit()
    pod = lab.api.pod("r", node="node-1")
    busy = Refusal(429, "TooManyRequests", "too many requests, please try again", retry_after=1)
    lab.api.watch_refusals += [busy] * 3
    lab.watch()
    lab.until(lambda: "too many requests" in lab.view.text)
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert sum("too many requests" in line for line in lab.view.said) == 1


@pytest.mark.parametrize("page", ['{"error": "log in"}', "[]", "<html>Log in</html>"])
def test_watch_survives_the_pages_of_a_proxy(lab: Any, page: str) -> None:
    lab.submit()
    pod = lab.api.pod("r", node="node-1")
    lab.api.watch_pages += [page] * 3  # one for each kind that is watched
    lab.watch()
    lab.until(lambda: not lab.api.watch_pages)
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert "the response is not" in lab.view.text


def test_machine_that_was_suspended_catches_up(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.submit()
    pod = lab.api.pod("r", node="node-1")
    lab.watch()
    lab.until(lambda: lab.view.phases[-1:] == ["running"])
    # During sleep the wall clock advances and the monotonic clock does not.
    wall = time.time
    monkeypatch.setattr("tita.launch.follow.time.time", lambda: wall() + 3600)
    lab.until(lambda: "slept for 60 min" in lab.view.text)
    lab.api.cut()
    lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    assert lab.outcome().code == ExitCode.OK
    assert lab.view.text.count("slept") == 1
