"""Answers requests: verbs, selectors, pages, conflicts, validation, watches, logs."""

import base64
import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes_validate

from fake_api.objects import Object, Objects, Refusal, now

KUEUE = "v1beta2"


class Requests(Objects):
    """Responses of the real API, and error responses on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = False
        self.denied: set[tuple[str, str]] = set()
        self.refusals: list[Refusal] = []
        """Each answers one request that is neither a watch nor a log."""
        self.watch_refusals: list[Refusal] = []
        self.watch_pages: list[str] = []
        """Each is the whole response to one watch, as of a proxy."""
        self.log_refusals: list[Refusal] = []
        self.longest_watch_s = 60.0
        self.ends_logs_at_once = False
        """Whether a proxy ends the stream of a log after the lines that are there."""
        self.on_job: Callable[[Object], None] | None = None
        self.slow_to_end = False
        """Whether a deleted Job and its pods stay until the test removes them."""

    def answer(self, method: str, path: str, params: dict[str, str], body: Object) -> Object:
        with self.changed:
            if self.refusals:
                raise self.refusals.pop(0)
            if path == "/version":
                return {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}
            if path == "/apis/kueue.x-k8s.io":
                return {"kind": "APIGroup", "preferredVersion": {"version": KUEUE}}
            if path.startswith("/apis/kueue.x-k8s.io/") and path.split("/")[3] != KUEUE:
                raise Refusal(404, "NotFound", "the server could not find the requested resource")
            resource, name, namespace = parse(path)
            if resource.startswith("selfsubjectaccessreviews"):
                return self._review(body)
            self.permit(_verb(method, name), resource)
            if method == "POST":
                return self._create(resource, body, params, namespace)
            if method == "GET":
                if not name:
                    return self._list(resource, params, namespace)
                return self.get(resource, name, namespace=namespace)
            if method == "PATCH":
                found = self.get(resource, name, namespace=namespace)
                if "spec" in body and "generation" in found["metadata"]:
                    found["metadata"]["generation"] += 1
                return self.put(resource, _merged(found, body))
            # https://kubernetes.io/docs/concepts/workloads/controllers/job/ : pods of a Job that
            # is deleted through the API without a policy stay.
            if self.slow_to_end and params.get("propagationPolicy") == "Foreground":
                item = self.get(resource, name, namespace=namespace)
                item["metadata"]["deletionTimestamp"] = now()
                return self.put(resource, item)
            orphan = "propagationPolicy" not in params
            self.remove(resource, name, orphan=orphan, namespace=namespace)
            return {"kind": "Status", "status": "Success"}

    def permit(self, verb: str, resource: str) -> None:
        if (verb, resource) in self.denied:
            raise Refusal(403, "Forbidden", f'{resource} is forbidden: User "ada" cannot {verb}')

    def _review(self, body: Object) -> Object:
        asked = body["spec"]["resourceAttributes"]
        resource = ".".join(part for part in (asked["resource"], asked["group"]) if part)
        resource += f"/{asked['subresource']}" if asked.get("subresource") else ""
        return {"status": {"allowed": (asked["verb"], resource) not in self.denied}}

    def _create(
        self, resource: str, body: Object, params: dict[str, str], namespace: str
    ) -> Object:
        name = body["metadata"]["name"]
        if namespace:
            body["metadata"]["namespace"] = namespace
        try:
            strict = params.get("fieldValidation") == "Strict"
            kubernetes_validate.validate(body, "1.36", strict=strict)
        except kubernetes_validate.ValidationError as error:
            # Fields that are unknown or of another type do not even decode.
            kind, version = body["kind"], body["apiVersion"].rpartition("/")[2]
            words = f'{kind} in version "{version}" cannot be handled as a {kind}: {error.message}'
            raise Refusal(400, "BadRequest", words) from None
        if invalid := _invalid(resource, body):
            raise Refusal(422, "Invalid", f'Job.batch "{name}" is invalid: {invalid}')
        if self._key(resource, dict(body["metadata"])) in self.objects:
            raise Refusal(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        if params.get("dryRun") == "All":
            return body
        made = self.put(resource, body)
        if resource == "jobs.batch" and self.on_job:
            threading.Thread(target=self.on_job, args=(made,), daemon=True).start()
        return made

    def _list(self, resource: str, params: dict[str, str], namespace: str) -> Object:
        # A continue token holds the version of the first page: later pages are as of then.
        start, version = 0, self.version
        if token := params.get("continue"):
            start, version = json.loads(base64.b64decode(token))
            if version < self.compacted:
                raise Refusal(410, "Expired", "The provided continue parameter is too old")
        items = [i for i in self._of(resource, namespace) if _selected(i, params)]
        size = int(params.get("limit", 0)) or len(items)
        page, more = items[start : start + size], items[start + size :]
        metadata = {"resourceVersion": str(version)}
        if more:
            raw = json.dumps([start + size, version]).encode()
            metadata["continue"] = base64.b64encode(raw).decode()
        return {"kind": "List", "metadata": metadata, "items": page}

    def _of(self, resource: str, namespace: str) -> list[Object]:
        found = [
            (key, item)
            for key, item in self.objects.items()
            if key[0] == resource and namespace in ("", key[1])
        ]
        return [copy.deepcopy(item) for _, item in sorted(found, key=lambda pair: pair[0])]

    def watch(
        self, resource: str, params: dict[str, str], namespace: str
    ) -> Iterator[Object | None]:
        """Changes after a version, None while there are none; ends with a timeout."""
        version = int(params["resourceVersion"])
        asked = float(params.get("timeoutSeconds", 60))
        until = time.monotonic() + min(asked, self.longest_watch_s)
        while self.alive and time.monotonic() < until:
            with self.changed:
                if version < self.compacted:
                    gone = {"kind": "Status", "code": 410, "reason": "Expired"}
                    yield {
                        "type": "ERROR",
                        "object": gone | {"message": "too old resource version"},
                    }
                    return
                new = [c for c in self.history if c[0] > version]
                if not new:
                    self.changed.wait(0.1)
            for number, found, kind, item in new:
                version = number
                ours = namespace in ("", item["metadata"].get("namespace"))
                if found == resource and ours and _selected(item, params):
                    yield {"type": kind, "object": item}
            yield None
        if params.get("allowWatchBookmarks"):
            yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}

    def log(self, name: str, params: dict[str, str]) -> Iterator[str | None]:
        """A container's log, from the first line or from a second on; None while it is silent."""
        with self.changed:
            state = self.get("pods", name)["status"].get("containerStatuses", [{}])[0]
            if "waiting" in state.get("state", {"waiting": {}}):
                words = f'container "tita" in pod "{name}" is waiting to start: ContainerCreating'
                raise Refusal(400, "BadRequest", words)
            log = self.logs[name][-2 if params.get("previous") else -1]
        follow = params.get("follow") and not self.ends_logs_at_once
        place = 0
        if count := params.get("tailLines"):
            place = max(0, len(log.lines) - int(count))
        since = params.get("sinceTime", "")[:19]
        while self.alive:
            with self.changed:
                new, closed = log.lines[place:], log.closed
                if not new and not closed and follow:
                    self.changed.wait(0.1)
            place += len(new)
            for stamp, text in new:
                if stamp[:19] >= since:
                    yield f"{stamp} {text}" if params.get("timestamps") else text
            if not new and (closed or not follow):
                return
            yield None


def parse(path: str) -> tuple[str, str, str]:
    """`/apis/batch/v1/namespaces/lab/jobs/x` as (`jobs.batch`, `x`, `lab`)."""
    parts = path.strip("/").split("/")
    group = parts[1] if parts[0] == "apis" else ""
    rest = parts[3:] if group else parts[2:]
    namespace = ""
    if rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    return f"{rest[0]}.{group}".rstrip("."), rest[1] if len(rest) > 1 else "", namespace


def _invalid(resource: str, job: Object) -> str:
    """The API's validation error for a Job, as observed on a real cluster."""
    if resource != "jobs.batch":
        return ""
    name, spec = job["metadata"]["name"], job["spec"]
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63:
        return f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain'
    if "podFailurePolicy" in spec:
        if (policy := spec["template"]["spec"].get("restartPolicy")) != "Never":
            return f'spec.template.spec.restartPolicy: Invalid value: "{policy}": must be "Never"'
        if spec.get("podReplacementPolicy", "Failed") != "Failed":
            return "spec.podReplacementPolicy: Unsupported value: supported values: Failed"
    return ""


def _verb(method: str, name: str) -> str:
    verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
    return verbs.get(method) or ("get" if name else "list")


def _selected(item: Object, params: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels") or {}
    for term in filter(None, params.get("labelSelector", "").split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for term in filter(None, params.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = item
        for part in path.split("."):
            found = (found or {}).get(part)
        if found != value:
            return False
    return True


def _merged(old: Object, new: Object) -> Object:
    """RFC 7396."""
    for key, value in new.items():
        if value is None:
            old.pop(key, None)
        elif isinstance(value, dict):
            old[key] = _merged(old.get(key) or {}, value)
        else:
            old[key] = value
    return old
