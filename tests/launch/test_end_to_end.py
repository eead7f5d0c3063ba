"""Launch, status, cancel, delete: against the fake API and against a real cluster.

With TITA_TEST_KUBECONFIG set to a kubeconfig whose context holds a release of the chart, the second
half runs there; it needs no GPU and no image.
"""

import os
import time
from typing import Any

import pytest

from tita.launch.cluster import Cluster, connect
from tita.launch.jobs import cancel, delete, list_jobs, read_status
from tita.launch.preflight import CheckStatus, check_api, check_rights
from tita.launch.submit import LaunchRequest, find_template, plan, submit
from tita.launch.template import new_run_name

IMAGE = "registry.invalid/no/such:image"


def launch_cancel_delete(cluster: Cluster) -> None:
    assert check_api(cluster).mark is CheckStatus.OK
    assert check_rights(cluster).mark is CheckStatus.OK
    run = new_run_name("train-dpo")
    template = find_template(cluster, "train-dpo")
    request = LaunchRequest(job="train-dpo", run=run, recipe={"beta": 0.2}, gpus=0, image=IMAGE)
    manifest, _ = plan(request, template)
    submit(cluster, manifest, dry_run=True)
    submit(cluster, manifest)
    try:
        wait_for(cluster, run, "check the image")
        assert run in [row["run"] for row in list_jobs(cluster, job="train-dpo")]
        cancel(cluster, run)
        assert "activeDeadlineSeconds" not in wait_for(cluster, run, "was cancelled")
    finally:
        delete(cluster, run)
    assert run not in [row["run"] for row in list_jobs(cluster)]


def wait_for(cluster: Cluster, run: str, words: str, *, timeout_s: float = 120.0) -> str:
    """The messages of the status, once they contain `words`."""
    deadline = time.monotonic() + timeout_s
    while words not in (told := " ".join(read_status(cluster, run)["told"])):
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    return told


def test_on_the_fake_api(lab: Any) -> None:
    def play(job: Any) -> None:
        run = job["metadata"]["name"]
        lab.api.waiting(lab.api.pod(run), "ImagePullBackOff", f'Back-off pulling image "{IMAGE}"')
        lab.until(lambda: lab.api.get("jobs.batch", run)["spec"]["activeDeadlineSeconds"] == 1)
        lab.api.job_over(run, "Failed", reason="DeadlineExceeded")

    lab.api.on_job = play
    launch_cancel_delete(lab.cluster)


def test_on_a_real_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig = os.environ.get("TITA_TEST_KUBECONFIG")
    if not kubeconfig:
        pytest.skip("TITA_TEST_KUBECONFIG names no kubeconfig")
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    launch_cancel_delete(connect())
