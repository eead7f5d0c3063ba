"""Cases of the values in `jobs`."""

from typing import Any

from tests.chart.values.case import SERVING, Case, Objects, job, jobspec, volume, worker
from tests.chart.values.shared import shared_cases


def rdma(objects: Objects) -> Any:
    limits = worker(objects)["containers"][0]["resources"]["limits"]
    return limits["rdma/hca_shared_devices_a"]


CASES: dict[str, Case] = {
    **shared_cases("jobs", worker, {}),
    "jobs.scratch.storageClass": Case(
        "fast",
        lambda o: (
            volume(worker(o), "scratch")["ephemeral"]["volumeClaimTemplate"]["spec"]
            == {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": "fast",
                "resources": {"requests": {"storage": "200Gi"}},
            }
        ),
        alone=True,
    ),
    "jobs.scratch.size": Case(
        "7Gi", lambda o: volume(worker(o), "scratch")["emptyDir"]["sizeLimit"] == "7Gi"
    ),
    "jobs.cache.storageClass": Case(
        "fast", lambda o: volume(worker(o), "cache")["ephemeral"], {"jobs.cache.size": "7Gi"}
    ),
    "jobs.cache.existingClaim": Case(
        "models",
        lambda o: volume(worker(o), "cache")["persistentVolumeClaim"] == {"claimName": "models"},
        alone=True,
    ),
    "jobs.rdma.enabled": Case(
        True, lambda o: rdma(o) == 1 and "rdma" not in str(worker(o, "benchmark")), alone=True
    ),
    "jobs.rdma.resourceName": Case(
        "rdma/ib",
        lambda o: worker(o)["containers"][0]["resources"]["limits"]["rdma/ib"] == 1,
        {"jobs.rdma.enabled": True},
    ),
    "jobs.rdma.count": Case(4, lambda o: rdma(o) == 4, {"jobs.rdma.enabled": True}, alone=True),
    "jobs.trackers.existingSecret": Case(
        "keys",
        lambda o: (
            {"secretRef": {"name": "keys"}} in worker(o)["containers"][0]["envFrom"]
            and "keys" not in str(worker(o, "build-pairs"))
        ),
        alone=True,
    ),
    "jobs.kueue.queueName": Case(
        "gpus",
        lambda o: (
            job(o)["spec"]["jobTemplate"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
            == "gpus"
            and jobspec(o)["suspend"] is True
        ),
        alone=True,
    ),
    "jobs.kueue.suspend": Case(
        False, lambda o: "suspend" not in jobspec(o), {"jobs.kueue.queueName": "gpus"}
    ),
    "jobs.suspend": Case(True, lambda o: job(o, "benchmark")["spec"]["suspend"], SERVING),
    "jobs.timeZone": Case(
        "Europe/Berlin", lambda o: job(o, "benchmark")["spec"]["timeZone"] == "Europe/Berlin"
    ),
    "jobs.ttlSecondsAfterFinished": Case(60, lambda o: jobspec(o)["ttlSecondsAfterFinished"] == 60),
    "jobs.historyLimit": Case(
        1,
        lambda o: (
            job(o)["spec"]["successfulJobsHistoryLimit"] == 1
            and job(o)["spec"]["failedJobsHistoryLimit"] == 1
        ),
    ),
    "jobs.labels": Case(
        {"a": "b"}, lambda o: job(o)["spec"]["jobTemplate"]["metadata"]["labels"]["a"] == "b"
    ),
    "jobs.podLabels": Case(
        {"a": "b"}, lambda o: jobspec(o)["template"]["metadata"]["labels"]["a"] == "b"
    ),
    "jobs.podAnnotations": Case(
        {"a": "b"}, lambda o: jobspec(o)["template"]["metadata"]["annotations"] == {"a": "b"}
    ),
    "jobs.perJob": Case(
        {"train-dpo": {"nodes": 2}},
        lambda o: jobspec(o)["completions"] == 2 and jobspec(o, "build-pairs")["completions"] == 1,
        alone=True,
    ),
}
