"""A Kubernetes API over HTTP that behaves like the real one where a launcher leans on it.

resourceVersions, lists in pages, selectors, watches that time out, bookmark and answer 410, both
kinds of 409, 403, 422 from the published schemas, dry runs, merge patches, logs that follow and
replay; and faults on demand. Pods do what a test says: there is no scheduler and no kubelet.
"""

import base64
import copy
import itertools
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kubernetes_validate

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
    "priorityclasses.scheduling.k8s.io": ("PriorityClass", "scheduling.k8s.io/v1"),
    "localqueues.kueue.x-k8s.io": ("LocalQueue", "kueue.x-k8s.io/v1beta1"),
    "workloads.kueue.x-k8s.io": ("Workload", "kueue.x-k8s.io/v1beta1"),
}
CLUSTER_WIDE = ("nodes", "priorityclasses.scheduling.k8s.io")
JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"


class Refusal(Exception):
    """An answer with a Status object."""

    def __init__(self, code: int, reason: str, message: str, *, retry_after: int | None = None):
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.retry_after = retry_after


@dataclass
class Log:
    """What one container wrote, stamped; `closed` when it ended."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def nanos() -> str:
    ns = time.time_ns()
    whole = datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{ns % 10**9:09d}".rstrip("0") + "Z"  # as Go prints it


class FakeApi:
    """The server, its objects, and the levers that tests pull."""

    def __init__(self, *, port: int = 0) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.history: list[tuple[int, str, str, Object]] = []
        self.version = 100
        self.compacted = 0
        self.logs: dict[str, list[Log]] = {}
        self.denied: set[tuple[str, str]] = set()
        self.refusals: list[Refusal] = []
        """Each answers one request that is no watch and no log."""
        self.requests: list[str] = []
        self.longest_watch_s = 60.0
        self.lost_answers = 0
        """So many POSTs are carried out, and their connection is cut before the answer."""
        self.on_job: Callable[[Object], None] | None = None
        self._port = port
        self._server: _Server | None = None

    # The process of the server: a test may take it away for a while.

    def start(self) -> "FakeApi":
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Go away: nobody listens, and open connections break."""
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        server.cut()
        with self.changed:
            self.changed.notify_all()

    @property
    def alive(self) -> bool:
        return self._server is not None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def compact(self) -> None:
        """Forget what was: watches from earlier versions get 410."""
        with self.changed:
            self.compacted = self.version
            self.history.clear()

    def cut(self) -> None:
        """Break all open connections."""
        assert self._server is not None
        self._server.cut()

    # Objects.

    def put(self, resource: str, item: Object, *, kind: str | None = None) -> Object:
        """Write an object; watchers see it."""
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

    def get(self, resource: str, name: str) -> Object:
        with self.changed:
            for (found, _, key), item in self.objects.items():
                if (found, key) == (resource, name):
                    return copy.deepcopy(item)
        group = KINDS[resource][0].lower() + "s"
        raise Refusal(404, "NotFound", f'{group} "{name}" not found')

    def remove(self, resource: str, name: str) -> None:
        """Delete an object, and with a Job its pods."""
        with self.changed:
            item = self.get(resource, name)
            del self.objects[self._key(resource, item["metadata"])]
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            self._tell(resource, "DELETED", item)
            if resource == "jobs.batch":
                for pod in self.pods(name):
                    self.remove("pods", pod["metadata"]["name"])
            if resource == "pods":
                for log in self.logs.get(name, []):
                    log.closed = True

    def _key(self, resource: str, metadata: Object) -> tuple[str, str, str]:
        namespace = "" if resource in CLUSTER_WIDE else metadata.setdefault("namespace", "lab")
        return resource, namespace, metadata["name"]

    def _tell(self, resource: str, event: str, item: Object) -> None:
        self.history.append((self.version, resource, event, copy.deepcopy(item)))
        self.changed.notify_all()

    # What a controller, a scheduler and a kubelet would do.

    def pods(self, run: str) -> list[Object]:
        with self.changed:
            return [
                copy.deepcopy(item)
                for (resource, _, _), item in self.objects.items()
                if resource == "pods" and item["metadata"]["labels"].get(JOB_NAME) == run
            ]

    def pod(self, run: str, index: int = 0, *, node: str = "", suffix: str = "abcde") -> str:
        """A new pod of a run: pending, or with `node` running."""
        name = f"{run}-{index}-{suffix}"
        labels = {JOB_NAME: run, INDEX: str(index), "app.kubernetes.io/component": "job"}
        item: Object = {
            "metadata": {"name": name, "labels": labels, "annotations": {INDEX: str(index)}},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "tita", "image": "tita"}]},
            "status": {"phase": "Pending"},
        }
        self.put("pods", item)
        self.logs[name] = [Log()]
        if node:
            self.run_pod(name, node=node)
        return name

    def status(self, name: str, **status: Any) -> None:
        """Lay fields over a pod's status."""
        pod = self.get("pods", name)
        pod["status"] |= status
        self.put("pods", pod)

    def unschedulable(self, name: str, message: str) -> None:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        self.status(name, conditions=[condition | {"message": message}])

    def waiting(self, name: str, reason: str, message: str = "", *, node: str = "node-1") -> None:
        self.container(name, {"waiting": {"reason": reason, "message": message}}, node=node)

    def run_pod(self, name: str, *, node: str = "node-1") -> None:
        self.status(name, phase="Running")
        self.container(name, {"running": {"startedAt": now()}}, node=node)

    def end_pod(
        self, name: str, code: int, *, reason: str = "", message: str = "", **status: Any
    ) -> None:
        """The container ends; more fields of the status say by what."""
        state = {"exitCode": code, "reason": reason or ("Completed" if not code else "Error")}
        self.container(name, {"terminated": state | {"message": message}})
        self.status(name, phase="Failed" if code else "Succeeded", **status)
        with self.changed:
            self.logs[name][-1].closed = True
            self.changed.notify_all()

    def restart(self, name: str) -> None:
        """The kubelet starts the container anew; its log begins anew."""
        with self.changed:
            self.logs[name][-1].closed = True
            self.logs[name].append(Log())
            self.container(name, {"running": {"startedAt": now()}}, restarts=1)

    def container(
        self, name: str, state: Object, *, node: str | None = None, restarts: int = 0
    ) -> None:
        pod = self.get("pods", name)
        if node:
            pod["spec"]["nodeName"] = node
            scheduled = {"type": "PodScheduled", "status": "True"}
            pod["status"]["conditions"] = [scheduled]
        pod["status"]["containerStatuses"] = [
            {"name": "tita", "state": state, "restartCount": restarts}
        ]
        self.put("pods", pod)

    def write(self, name: str, *texts: str) -> None:
        """The container writes lines."""
        with self.changed:
            for text in texts:
                self.logs[name][-1].lines.append((nanos(), text))
            self.changed.notify_all()

    def event(self, name: str, reason: str, message: str, *, kind: str = "Pod") -> None:
        item = {
            "metadata": {"name": f"{name}.{uuid.uuid4().hex[:8]}"},
            "involvedObject": {"kind": kind, "name": name},
            "reason": reason,
            "message": message,
            "lastTimestamp": now(),
        }
        self.put("events", item)

    def job_over(self, run: str, kind: str, *, reason: str = "", message: str = "") -> None:
        """The Job is `Complete` or `Failed`; active pods of a failed one are deleted."""
        job = self.get("jobs.batch", run)
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        failed = [p for p in self.pods(run) if p["status"]["phase"] == "Failed"]
        job["status"] = {"conditions": [condition], "failed": len(failed)}
        if kind == "Complete":
            job["status"]["completionTime"] = now()
        else:
            for pod in self.pods(run):
                if pod["status"]["phase"] in ("Pending", "Running"):
                    self.remove("pods", pod["metadata"]["name"])
        self.put("jobs.batch", job)

    # Requests.

    def answer(self, method: str, path: str, params: dict[str, str], body: Object) -> Object:
        with self.changed:
            if self.refusals:
                raise self.refusals.pop(0)
            if path == "/version":
                return {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}
            resource, name = _parse(path)
            if resource.startswith("selfsubjectaccessreviews"):
                return self._review(body)
            self.permit(_verb(method, name), resource)
            if method == "POST":
                return self._create(resource, body, params)
            if method == "GET":
                return self.get(resource, name) if name else self._list(resource, params)
            if method == "PATCH":
                return self.put(resource, _merged(self.get(resource, name), body))
            self.remove(resource, name)
            return {"kind": "Status", "status": "Success"}

    def permit(self, verb: str, resource: str) -> None:
        if (verb, resource) in self.denied:
            raise Refusal(403, "Forbidden", f'{resource} is forbidden: User "ada" cannot {verb}')

    def _review(self, body: Object) -> Object:
        asked = body["spec"]["resourceAttributes"]
        resource = ".".join(part for part in (asked["resource"], asked["group"]) if part)
        resource += f"/{asked['subresource']}" if asked.get("subresource") else ""
        return {"status": {"allowed": (asked["verb"], resource) not in self.denied}}

    def _create(self, resource: str, body: Object, params: dict[str, str]) -> Object:
        name = body["metadata"]["name"]
        try:
            strict = params.get("fieldValidation") == "Strict"
            kubernetes_validate.validate(body, "1.36", strict=strict)
        except kubernetes_validate.ValidationError as error:
            words = f'Job.batch "{name}" is invalid: {error.message}'
            raise Refusal(422, "Invalid", words) from None
        if self._key(resource, dict(body["metadata"])) in self.objects:
            raise Refusal(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        if params.get("dryRun") == "All":
            return body
        made = self.put(resource, body)
        if resource == "jobs.batch" and self.on_job:
            threading.Thread(target=self.on_job, args=(made,), daemon=True).start()
        return made

    def _list(self, resource: str, params: dict[str, str]) -> Object:
        # A continue token holds the version of the first page: later pages are as of then.
        start, version = 0, self.version
        if token := params.get("continue"):
            start, version = json.loads(base64.b64decode(token))
            if version < self.compacted:
                raise Refusal(410, "Expired", "The provided continue parameter is too old")
        items = [i for i in self._of(resource) if _selected(i, params)]
        size = int(params.get("limit", 0)) or len(items)
        page, more = items[start : start + size], items[start + size :]
        metadata = {"resourceVersion": str(version)}
        if more:
            raw = json.dumps([start + size, version]).encode()
            metadata["continue"] = base64.b64encode(raw).decode()
        return {"kind": "List", "metadata": metadata, "items": page}

    def _of(self, resource: str) -> list[Object]:
        found = [(key, i) for key, i in self.objects.items() if key[0] == resource]
        return [copy.deepcopy(item) for _, item in sorted(found, key=lambda pair: pair[0])]

    def watch(self, resource: str, params: dict[str, str]) -> Iterator[Object | None]:
        """Changes after a version, None while there are none; ends by time-out."""
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
                if found == resource and _selected(item, params):
                    yield {"type": kind, "object": item}
            yield None
        if params.get("allowWatchBookmarks"):
            yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}

    def log(self, name: str, params: dict[str, str]) -> Iterator[str | None]:
        """A container's log, from its first line or from a second on; None while it is silent."""
        with self.changed:
            state = self.get("pods", name)["status"].get("containerStatuses", [{}])[0]
            if "waiting" in state.get("state", {"waiting": {}}):
                words = f'container "tita" in pod "{name}" is waiting to start: ContainerCreating'
                raise Refusal(400, "BadRequest", words)
            log = self.logs[name][-2 if params.get("previous") else -1]
        place = 0
        if count := params.get("tailLines"):
            place = max(0, len(log.lines) - int(count))
        since = params.get("sinceTime", "")[:19]
        while self.alive:
            with self.changed:
                new, closed = log.lines[place:], log.closed
                if not new and not closed and params.get("follow"):
                    self.changed.wait(0.1)
            place += len(new)
            for stamp, text in new:
                if stamp[:19] >= since:
                    yield f"{stamp} {text}" if params.get("timestamps") else text
            if not new and (closed or not params.get("follow")):
                return
            yield None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.open.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        params = dict(parse_qsl(url.query))
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        self.api.requests.append(f"{self.command} {self.path}")
        if not self.api.alive:
            self.close_connection = True
            return
        try:
            if params.get("watch"):
                self._stream_watch(url.path, params)
            elif url.path.endswith("/log"):
                self._stream_log(url.path, params)
            else:
                answer = self.api.answer(self.command, url.path, params, body)
                if self.command == "POST" and self.api.lost_answers and "dryRun" not in params:
                    self.api.lost_answers -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._send(201 if self.command == "POST" else 200, answer)
        except Refusal as refusal:
            self._refuse(refusal)

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _stream_watch(self, path: str, params: dict[str, str]) -> None:
        resource, _ = _parse(path)
        self.api.permit("watch", resource)
        changes = self.api.watch(resource, params)
        self._stream(change and json.dumps(change) for change in changes)

    def _stream_log(self, path: str, params: dict[str, str]) -> None:
        self.api.permit("get", "pods/log")
        lines = self.api.log(path.split("/")[-2], params)
        first = next(lines, None)  # refusals come before the headers
        self._stream(itertools.chain([first], lines))

    def _stream(self, lines: Iterable[str | None]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for line in lines:
            if line is not None:
                self._chunk(line)
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, line: str) -> None:
        data = line.encode() + b"\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send(self, code: int, answer: Object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, refusal: Refusal) -> None:
        data = json.dumps(
            {"kind": "Status", "status": "Failure", "code": refusal.code}
            | {"reason": refusal.reason, "message": refusal.message}
        ).encode()
        self.send_response(refusal.code)
        if refusal.retry_after is not None:
            self.send_header("Retry-After", str(refusal.retry_after))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """The test says what happened."""


def _parse(path: str) -> tuple[str, str]:
    """`/apis/batch/v1/namespaces/lab/jobs/x` as (`jobs.batch`, `x`)."""
    parts = path.strip("/").split("/")
    group = parts[1] if parts[0] == "apis" else ""
    rest = parts[3:] if group else parts[2:]
    if rest[0] == "namespaces":
        rest = rest[2:]
    return f"{rest[0]}.{group}".rstrip("."), rest[1] if len(rest) > 1 else ""


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
