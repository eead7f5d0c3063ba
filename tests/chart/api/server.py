"""An in-memory Kubernetes API server, sufficient for helm and kubectl.

It stores objects, assigns uids, rejects changes of immutable fields and records requests. It has
no controllers. The real server takes merge keys from the schema; this one guesses them. A
pod's log is its field `log`.
"""

import json
import re
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.chart.api.decoding import read_body
from tests.chart.api.kinds import KINDS, Kind, discovery
from tests.chart.api.patching import immutable, merge

Object = dict[str, Any]

_PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[\w.-]+/v\w+))"
    r"(?:/namespaces/(?P<namespace>[\w.-]+)(?=/))?/(?P<plural>\w+)"
    r"(?:/(?P<name>[\w.:-]+)(?:/(?P<sub>scale|log))?)?$"
)


NAMESPACE = "lab"
"""The namespace of the kubeconfig."""


def key_of(plural: str, name: str, namespace: str) -> tuple[str, str]:
    """The key of an object: objects of other namespaces than `lab` have it before their name."""
    return plural, name if namespace in ("", NAMESPACE) else f"{namespace}/{name}"


class ApiServer(ThreadingHTTPServer):
    """`objects` is keyed by `key_of`; `requests` are (method, plural, name)."""

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
        """Return a kubeconfig for this server."""
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
        """Store an object with a new resource version."""
        self.revision += 1
        metadata = object_.setdefault("metadata", {})
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        metadata.setdefault("generation", 1)
        metadata["resourceVersion"] = str(self.revision)
        key = key_of(plural, metadata["name"], metadata.get("namespace", ""))
        self.objects[key] = object_
        return object_


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # send headers and body in one segment; otherwise the client waits
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

    def _key(self, kind: Kind, name: str) -> tuple[str, str]:
        return key_of(kind.plural, name, self.namespace)

    def _in_namespace(self, object_: Object) -> Object:
        if self.namespace:
            object_["metadata"]["namespace"] = self.namespace
        return object_

    def _fail(self, code: int, reason: str, message: str = "") -> None:
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self._send(code, {**body, "reason": reason, "message": message or reason})

    def _handle(self) -> None:
        path, _, query_text = self.path.partition("?")
        query = {k: v[0] for k, v in urllib.parse.parse_qs(query_text).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (discovered := discovery(path, server_version=self.server.version)) is not None:
            self._send(200, discovered)
            return
        match = _PATH.match(urllib.parse.unquote(path))
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
        self.namespace = (match["namespace"] or "") if kind.namespaced else ""
        with self.server.lock:
            self.server.requests.append((self.command, kind.plural, name))
            if match["sub"]:
                getattr(self, f"_{match['sub']}")(kind, name, body)
            else:
                getattr(self, f"_{self.command.lower()}")(kind, name, query, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _scale(self, kind: Kind, name: str, body: bytes) -> None:
        """`spec.replicas` as an object of its own, which `kubectl scale` reads and patches."""
        found = self.server.objects.get(self._key(kind, name))
        if found is None:
            self._fail(404, "NotFound")
            return
        if self.command == "PATCH":
            found["spec"]["replicas"] = read_body(body)["spec"]["replicas"]
            self.server.put(kind.plural, found)
        spec = {"replicas": found["spec"].get("replicas", 1)}
        kept = {k: found["metadata"][k] for k in ("name", "namespace", "resourceVersion")}
        scale = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": kept, "spec": spec}
        self._send(200, scale)

    def _log(self, kind: Kind, name: str, _body: bytes) -> None:
        found = self.server.objects.get(self._key(kind, name))
        if found is None:
            self._fail(404, "NotFound")
            return
        text = found.get("log", "").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _get(self, kind: Kind, name: str, query: dict[str, str], _body: bytes) -> None:
        if name:
            found = self.server.objects.get(self._key(kind, name))
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
            if plural == kind.plural
            and wanted.items() <= o["metadata"].get("labels", {}).items()
            and (not self.namespace or o["metadata"].get("namespace", NAMESPACE) == self.namespace)
        ]
        metadata = {"resourceVersion": str(self.server.revision)}
        body = {"kind": f"{kind.kind}List", "apiVersion": kind.version, "metadata": metadata}
        self._send(200, {**body, "items": items})

    def _post(self, kind: Kind, _name: str, _query: dict[str, str], body: bytes) -> None:
        created = self._in_namespace(read_body(body))
        if self._key(kind, created["metadata"]["name"]) in self.server.objects:
            self._fail(409, "AlreadyExists")
            return
        self._send(201, self.server.put(kind.plural, created))

    def _put(self, kind: Kind, name: str, _query: dict[str, str], body: bytes) -> None:
        self._change(kind, name, read_body(body))

    def _patch(self, kind: Kind, name: str, _query: dict[str, str], body: bytes) -> None:
        patch = read_body(body)
        old = self.server.objects.get(self._key(kind, name))
        form = self.headers["Content-Type"].removeprefix("application/").split("+")[0]
        if form == "apply-patch":
            # A single field manager owns all fields, so the applied object replaces the old one.
            if old is None:
                self._send(201, self.server.put(kind.plural, self._in_namespace(patch)))
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
        old = self.server.objects.get(self._key(kind, name))
        if old is None:
            self._fail(404, "NotFound")
        elif immutable(old) != immutable(new):
            self._fail(422, "Invalid", f"{kind.kind} {name}: field is immutable")
        else:
            new["metadata"]["uid"] = old["metadata"]["uid"]
            self._send(200, self.server.put(kind.plural, self._in_namespace(new)))

    def _delete(self, kind: Kind, name: str, _query: dict[str, str], _body: bytes) -> None:
        if self.server.objects.pop(self._key(kind, name), None) is None:
            self._fail(404, "NotFound")
        else:
            self._send(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
