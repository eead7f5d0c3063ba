"""The fake API works with the official client."""

import threading
from typing import Any

import pytest
from kubernetes import client, watch


@pytest.fixture
def official(lab: Any) -> client.ApiClient:
    configuration = client.Configuration(host=lab.api.url)
    return client.ApiClient(configuration)


def test_lists_gets_and_selectors(lab: Any, official: client.ApiClient) -> None:
    for index in range(3):
        lab.api.pod("r", index)
    core = client.CoreV1Api(official)
    found = core.list_namespaced_pod("lab", label_selector="batch.kubernetes.io/job-name=r")
    assert len(found.items) == 3
    first = core.list_namespaced_pod("lab", limit=2)
    rest = core.list_namespaced_pod("lab", limit=2, _continue=first.metadata._continue)
    assert len(first.items) + len(rest.items) == 3
    chosen = core.list_namespaced_pod("lab", field_selector="metadata.name=r-1-abcde")
    assert [pod.metadata.name for pod in chosen.items] == ["r-1-abcde"]


def test_watch_from_a_version(lab: Any, official: client.ApiClient) -> None:
    core = client.CoreV1Api(official)
    version = core.list_namespaced_pod("lab").metadata.resource_version
    threading.Timer(0.2, lambda: lab.api.pod("r", 0)).start()
    stream = watch.Watch().stream(
        core.list_namespaced_pod, "lab", resource_version=version, timeout_seconds=2
    )
    assert [(e["type"], e["object"].metadata.name) for e in stream] == [("ADDED", "r-0-abcde")]


def test_versions_that_are_too_old(lab: Any, official: client.ApiClient) -> None:
    core = client.CoreV1Api(official)
    lab.api.pod("r", 0)
    lab.api.compact()
    with pytest.raises(client.ApiException) as caught:
        list(
            watch.Watch().stream(
                core.list_namespaced_pod, "lab", resource_version="1", timeout_seconds=2
            )
        )
    assert caught.value.status == 410


def test_both_conflicts_and_invalid_fields(lab: Any, official: client.ApiClient) -> None:
    lab.submit("one")
    batch = client.BatchV1Api(official)
    job = lab.api.get("jobs.batch", "one")
    with pytest.raises(client.ApiException) as taken:
        batch.create_namespaced_job("lab", job)
    assert taken.value.status == 409
    job["metadata"]["name"] = "two"
    job["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "many"
    with pytest.raises(client.ApiException) as invalid:
        batch.create_namespaced_job("lab", job, field_validation="Strict")
    assert invalid.value.status == 400


def test_invalid_job_is_refused(lab: Any, official: client.ApiClient) -> None:
    lab.submit("one")
    batch = client.BatchV1Api(official)
    job = lab.api.get("jobs.batch", "one")
    job["metadata"]["name"] = "two"
    job["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"
    with pytest.raises(client.ApiException, match="restartPolicy") as refused:
        batch.create_namespaced_job("lab", job, field_validation="Strict")
    assert refused.value.status == 422


def test_deleting_a_job_without_a_policy_orphans_its_pods(
    lab: Any, official: client.ApiClient
) -> None:
    batch = client.BatchV1Api(official)
    for run, policy, num_left in (("one", {}, 1), ("two", {"propagation_policy": "Background"}, 0)):
        lab.submit(run)
        lab.api.pod(run)
        batch.delete_namespaced_job(run, "lab", **policy)
        assert len(lab.api.pods(run)) == num_left


def test_logs(lab: Any, official: client.ApiClient) -> None:
    pod = lab.api.pod("r", node="node-1")
    lab.api.write(pod, "one", "two")
    core = client.CoreV1Api(official)
    raw = core.read_namespaced_pod_log(pod, "lab", tail_lines=1, _preload_content=False)
    assert raw.data == b"two\n"
