"""The objects of the fake API, their history, and the logs of containers."""

import copy
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
KINDS = {
    "jobs.batch": ("Job", "batch/v1"),
    "cronjobs.batch": ("CronJob", "batch/v1"),
    "pods": ("Pod", "v1"),
    "events": ("Event", "v1"),
    "nodes": ("Node", "v1"),
    "secrets": ("Secret", "v1"),
    "serviceaccounts": ("ServiceAccount", "v1"),
    "persistentvolumeclaims": ("PersistentVolumeClaim", "v1"),
    "deployments.apps": ("Deployment", "apps/v1"),
    "statefulsets.apps": ("StatefulSet", "apps/v1"),
    "priorityclasses.scheduling.k8s.io": ("PriorityClass", "scheduling.k8s.io/v1"),
    "localqueues.kueue.x-k8s.io": ("LocalQueue", "kueue.x-k8s.io/v1beta2"),
    "workloads.kueue.x-k8s.io": ("Workload", "kueue.x-k8s.io/v1beta2"),
}
CLUSTER_WIDE = ("nodes", "priorityclasses.scheduling.k8s.io")
JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"


class Refusal(Exception):
    """An error response with a Status object."""

    def __init__(self, code: int, reason: str, message: str, *, retry_after: int | None = None):
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.retry_after = retry_after


@dataclass
class Log:
    """Timestamped lines of one container; `closed` when it has ended."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def nanos() -> str:
    ns = time.time_ns()
    whole = datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{ns % 10**9:09d}".rstrip("0") + "Z"  # as Go prints it


class Objects:
    """Objects by resource, namespace and name; every write has a resourceVersion."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.history: list[tuple[int, str, str, Object]] = []
        self.version = 100
        self.compacted = 0
        self.logs: dict[str, list[Log]] = {}

    def compact(self) -> None:
        """Drop the history: watches from earlier versions get 410."""
        with self.changed:
            self.compacted = self.version
            self.history.clear()

    def put(self, resource: str, item: Object, *, kind: str | None = None) -> Object:
        """Create or replace an object, and notify watches."""
        with self.changed:
            key = self._key(resource, item["metadata"])
            self.version += 1
            item = copy.deepcopy(item)
            item["kind"], item["apiVersion"] = KINDS[resource]
            metadata = item["metadata"]
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now())
            metadata["resourceVersion"] = str(self.version)
            event = kind or ("MODIFIED" if key in self.objects else "ADDED")
            self.objects[key] = item
            self._tell(resource, event, item)
            return copy.deepcopy(item)

    def get(self, resource: str, name: str, *, namespace: str = "") -> Object:
        """An object of this namespace; without one, the first of that name."""
        with self.changed:
            for (found, space, key), item in self.objects.items():
                if (found, key) == (resource, name) and namespace in ("", space):
                    return copy.deepcopy(item)
        raise Refusal(404, "NotFound", f'{resource} "{name}" not found')

    def remove(
        self, resource: str, name: str, *, orphan: bool = False, namespace: str = ""
    ) -> None:
        """Delete an object, and a Job's pods unless `orphan`."""
        with self.changed:
            item = self.get(resource, name, namespace=namespace)
            namespace = item["metadata"].get("namespace") or ""
            del self.objects[self._key(resource, item["metadata"])]
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            self._tell(resource, "DELETED", item)
            if resource == "jobs.batch" and not orphan:
                for pod in self.pods(name, namespace=namespace):
                    self.remove("pods", pod["metadata"]["name"], namespace=namespace)
            if resource == "pods":
                for log in self.logs.get(name, []):
                    log.closed = True

    def pods(self, run: str, *, namespace: str = "") -> list[Object]:
        with self.changed:
            return [
                copy.deepcopy(item)
                for (resource, space, _), item in self.objects.items()
                if resource == "pods"
                and namespace in ("", space)
                and item["metadata"]["labels"].get(JOB_NAME) == run
            ]

    def _key(self, resource: str, metadata: Object) -> tuple[str, str, str]:
        namespace = "" if resource in CLUSTER_WIDE else metadata.setdefault("namespace", "lab")
        return resource, namespace, metadata["name"]

    def _tell(self, resource: str, event: str, item: Object) -> None:
        self.history.append((self.version, resource, event, copy.deepcopy(item)))
        self.changed.notify_all()
