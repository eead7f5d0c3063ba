"""An API server of one namespace, in memory: enough of it for helm and kubectl.

It keeps objects, gives them uids, refuses changes of what is immutable, and remembers requests. It
runs no controller. Where the real one merges by schema, this one guesses the merge key.
"""

import base64
import copy
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import yaml

Object = dict[str, Any]


class Kind(NamedTuple):
    """A kind of objects that the server knows."""

    version: str
    kind: str
    plural: str
    namespaced: bool = True


KINDS = [
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Event", "events"),
    Kind("v1", "Namespace", "namespaces", False),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    Kind("v1", "Pod", "pods"),
    Kind("v1", "Secret", "secrets"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    Kind("batch/v1", "CronJob", "cronjobs"),
    Kind("batch/v1", "Job", "jobs"),
    Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes"),
    Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors"),
    Kind("networking.k8s.io/v1", "Ingress", "ingresses"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", False),
    Kind("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", False),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
]
_PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[\w.-]+/v\w+))"
    r"(?:/namespaces/(?P<namespace>[\w.-]+)(?=/))?/(?P<plural>\w+)(?:/(?P<name>[\w.-]+))?$"
)
_MERGE_KEYS = ("name", "mountPath", "containerPort", "port", "topologyKey")


class ApiServer(ThreadingHTTPServer):
    """The server; `objects` is by (plural, name), `requests` are (method, plural, name)."""

    daemon_threads = True

    def __init__(self, *, version: str = "1.36") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = version
        self.objects: dict[tuple[str, str], Object] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()
        self.revision = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def kubeconfig(self) -> str:
        """A kubeconfig for this server, as text."""
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": {"server": self.url}}],
                "users": [{"name": "test", "user": {}}],
                "contexts": [
                    {
                        "name": "test",
                        "context": {"cluster": "test", "user": "test", "namespace": "lab"},
                    }
                ],
                "current-context": "test",
            }
        )

    def put(self, plural: str, object_: Object) -> Object:
        """Keep an object as it will be read: with a new resource version."""
        self.revision += 1
        metadata = object_.setdefault("metadata", {})
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        metadata["resourceVersion"] = str(self.revision)
        self.objects[plural, metadata["name"]] = object_
        return object_


def read_body(body: bytes) -> Object:
    """A request's object: JSON, YAML, or a Secret in protobuf, which is how helm keeps releases."""
    if not body.startswith(b"k8s\0"):
        found: Object = yaml.load(body, Loader=yaml.CSafeLoader)
        return found
    # runtime.Unknown: 1 is the type, 2 the object. Numbers are those of generated.proto.
    envelope = dict(_fields(body[4:]))
    kind = dict(_fields(envelope[1]))[2].decode()
    assert kind == "Secret", f"protobuf of a {kind}"
    secret = list(_fields(envelope[2]))
    metadata = list(_fields(dict(secret)[1]))
    return {
        "apiVersion": "v1",
        "kind": kind,
        "type": dict(secret)[3].decode(),
        "metadata": {
            "name": dict(metadata)[1].decode(),
            "labels": {k: v.decode() for k, v in _entries(metadata, 11)},
        },
        "data": {k: base64.b64encode(v).decode() for k, v in _entries(secret, 2)},
    }


def _entries(fields: list[tuple[int, bytes]], number: int) -> Iterator[tuple[str, bytes]]:
    for entry in (dict(_fields(value)) for n, value in fields if n == number):
        yield entry[1].decode(), entry.get(2, b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, value) of a protobuf message's length-delimited fields; varints are passed over."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        size = varint()
        if wire == 2:
            yield number, message[at : at + size]
            at += size


def immutable(object_: Object) -> Any:
    """What the real server refuses to see changed."""
    spec = object_.get("spec", {})
    match object_["kind"]:
        case "Deployment":
            return spec["selector"]
        case "StatefulSet":
            changeable = ("replicas", "template", "updateStrategy", "minReadySeconds")
            return {k: v for k, v in spec.items() if k not in changeable}
        case "PersistentVolumeClaim":
            return {k: v for k, v in spec.items() if k != "resources"}
        case "Job":
            return spec["template"], spec["completions"]
        case "Pod":
            return spec
        case "Service":
            return spec.get("clusterIP")
        case "RoleBinding" | "ClusterRoleBinding":
            return object_["roleRef"]
    return None


def merge(old: Any, patch: Any, *, strategic: bool) -> Any:
    """`patch` laid over `old`; null deletes, and a strategic patch merges lists by key."""
    if isinstance(old, dict) and isinstance(patch, dict):
        merged = dict(old)
        for key, value in patch.items():
            if key.startswith("$setElementOrder") or key == "$retainKeys":
                continue
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge(merged.get(key), value, strategic=strategic)
        return merged
    if strategic and isinstance(old, list) and isinstance(patch, list):
        key = next(
            (k for k in _MERGE_KEYS if all(k in e for e in patch if isinstance(e, dict))), ""
        )
        if key and all(isinstance(e, dict) for e in old + patch):
            by_key = {e.get(key): e for e in old}
            for element in patch:
                if element.get("$patch") == "delete":
                    by_key.pop(element[key], None)
                else:
                    at = element[key]
                    by_key[at] = merge(by_key.get(at, {}), element, strategic=True)
            return list(by_key.values())
    return copy.deepcopy(patch)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one segment, or the client waits for both
    server: ApiServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, code: int, body: Object) -> None:
        payload = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _fail(self, code: int, reason: str, message: str = "") -> None:
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self._send(code, {**body, "reason": reason, "message": message or reason})

    def _handle(self) -> None:
        path, _, query_text = self.path.partition("?")
        query = {k: v[0] for k, v in urllib.parse.parse_qs(query_text).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (discovered := self._discovery(path)) is not None:
            self._send(200, discovered)
            return
        match = _PATH.match(path)
        kind = None
        if match:
            version = match["core"] or match["group"]
            kind = next(
                (k for k in KINDS if (k.version, k.plural) == (version, match["plural"])), None
            )
        if match is None or kind is None:
            self._fail(404, "NotFound", f"the server could not find {path}")
            return
        name = match["name"] or ""
        with self.server.lock:
            self.server.requests.append((self.command, kind.plural, name))
            getattr(self, f"_{self.command.lower()}")(kind, name, query, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _discovery(self, path: str) -> Object | None:
        groups = sorted({k.version for k in KINDS if "/" in k.version})
        if path == "/version":
            return {"major": "1", "minor": "36", "gitVersion": f"v{self.server.version}.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": g, "version": g.split("/")[1]} for g in groups]
            return {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {
                        "name": v["groupVersion"].split("/")[0],
                        "versions": [v],
                        "preferredVersion": v,
                    }
                    for v in versions
                ],
            }
        version = path.removeprefix("/apis/").removeprefix("/api/")
        kinds = [k for k in KINDS if k.version == version]
        if not kinds:
            return None
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": version,
            "resources": [
                {
                    "name": k.plural,
                    "singularName": k.kind.lower(),
                    "namespaced": k.namespaced,
                    "kind": k.kind,
                    "verbs": verbs,
                }
                for k in kinds
            ],
        }

    def _get(self, kind: Kind, name: str, query: dict[str, str], _body: bytes) -> None:
        if name:
            found = self.server.objects.get((kind.plural, name))
            if found is None:
                self._fail(404, "NotFound", f'{kind.plural} "{name}" not found')
            else:
                self._send(200, found)
            return
        wanted = dict(
            part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part
        )
        items = [
            o
            for (plural, _), o in self.server.objects.items()
            if plural == kind.plural and wanted.items() <= o["metadata"].get("labels", {}).items()
        ]
        metadata = {"resourceVersion": str(self.server.revision)}
        body = {"kind": f"{kind.kind}List", "apiVersion": kind.version, "metadata": metadata}
        self._send(200, {**body, "items": items})

    def _post(self, kind: Kind, _name: str, _query: dict[str, str], body: bytes) -> None:
        created = read_body(body)
        if (kind.plural, created["metadata"]["name"]) in self.server.objects:
            self._fail(409, "AlreadyExists")
            return
        self._send(201, self.server.put(kind.plural, created))

    def _put(self, kind: Kind, name: str, _query: dict[str, str], body: bytes) -> None:
        self._change(kind, name, read_body(body))

    def _patch(self, kind: Kind, name: str, _query: dict[str, str], body: bytes) -> None:
        patch = read_body(body)
        old = self.server.objects.get((kind.plural, name))
        form = self.headers["Content-Type"].removeprefix("application/").split("+")[0]
        if form == "apply-patch":
            # One manager owns all: what it applies is the object, but for what the server keeps.
            if old is None:
                self._send(201, self.server.put(kind.plural, patch))
                return
            kept = {k: old["metadata"][k] for k in ("uid", "creationTimestamp")}
            patch["metadata"] |= kept
            self._change(kind, name, patch)
        elif old is None:
            self._fail(404, "NotFound")
        else:
            strategic = form == "strategic-merge-patch"
            self._change(kind, name, merge(old, patch, strategic=strategic))

    def _change(self, kind: Kind, name: str, new: Object) -> None:
        old = self.server.objects.get((kind.plural, name))
        if old is None:
            self._fail(404, "NotFound")
        elif immutable(old) != immutable(new):
            self._fail(422, "Invalid", f"{kind.kind} {name}: field is immutable")
        else:
            new["metadata"]["uid"] = old["metadata"]["uid"]
            self._send(200, self.server.put(kind.plural, new))

    def _delete(self, kind: Kind, name: str, _query: dict[str, str], _body: bytes) -> None:
        if self.server.objects.pop((kind.plural, name), None) is None:
            self._fail(404, "NotFound")
        else:
            self._send(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
