"""The Kubernetes API over HTTP, as plain dicts, with the patience that a network needs."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import httpx

from tita.errors import TitaError, Unreachable
from tita.launch.kubeconfig import Access, load_access
from tita.launch.objects import Object
from tita.terminal import say

# A watch is asked to end after this long, and a silent connection is given up a little later: of
# an API server that froze, or of one that a laptop slept through, nothing else ever comes.
WATCH_S = 50
SILENCE_S = WATCH_S + 10
PAGE = 500


class ApiError(TitaError):
    """The API said no. `status` is HTTP's, `reason` is Kubernetes' own word."""

    def __init__(self, status: int, reason: str, message: str, *, where: str) -> None:
        super().__init__(message or reason or f"HTTP {status}", where=where)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long calls are tried again; an API that froze uses its seconds up, not its tries."""

    tries: int = 5
    first_pause_s: float = 0.5
    timeout_s: float = 15.0
    total_s: float = 30.0
    tell: Callable[[str], None] | None = None
    """Where to say that a call is tried again; what is silent for long looks hung."""


class Cluster:
    """One namespace of one cluster; safe to use from several threads."""

    def __init__(
        self,
        access: Access,
        *,
        patience: RetryPolicy | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        self.access = access
        self.namespace = access.namespace
        self._patience = patience or RetryPolicy()
        self._kueue = ""
        self._http = http or _open_http(access, timeout_s=self._patience.timeout_s)

    def without_retries(self) -> "Cluster":
        """The same cluster for a caller that tries again by itself, and says so."""
        patience = replace(self._patience, tries=1, tell=None)
        return Cluster(self.access, patience=patience, http=self._http)

    def path(self, resource: str, name: str = "", *, sub: str = "") -> str:
        """The address of objects: `jobs.batch`, `pods`, `nodes`, ... as kubectl names them."""
        plural, _, group = resource.partition(".")
        version = self._kueue_version() if group == "kueue.x-k8s.io" else "v1"
        root = f"/apis/{group}/{version}" if group else "/api/v1"
        scope = "" if plural in _CLUSTER_WIDE else f"/namespaces/{quote(self.namespace)}"
        tail = "".join(f"/{quote(part)}" for part in (plural, name, sub) if part)
        return f"{root}{scope}{tail}"

    def _kueue_version(self) -> str:
        """Kueue's API is not at v1 yet and moves on; without Kueue any version is as good."""
        if not self._kueue:
            try:
                group = self.get("/apis/kueue.x-k8s.io")
                self._kueue = str(group["preferredVersion"]["version"])
            except ApiError:
                self._kueue = "v1beta1"
        return self._kueue

    def get(self, path: str, **params: str) -> Object:
        """One object."""
        return self._call("GET", path, params=params)

    def list(self, path: str, **params: str) -> tuple[list[Object], str]:
        """All objects, page by page, and the resourceVersion that a watch goes on from."""
        while True:
            items: list[Object] = []
            token = ""
            try:
                while True:
                    page = {**params, "limit": str(PAGE)} | ({"continue": token} if token else {})
                    answer = self._call("GET", path, params=page)
                    items += answer.get("items") or []
                    token = answer["metadata"].get("continue") or ""
                    if not token:
                        return items, answer["metadata"].get("resourceVersion", "")
            except ApiError as error:
                if error.status != 410 or not token:  # the list grew too old between its pages
                    raise

    def create(self, path: str, body: Object, **params: str) -> Object:
        """Make an object. After a lost answer it is found by its name, not made twice."""
        return self._call("POST", path, params={"fieldValidation": "Strict", **params}, body=body)

    def patch(self, path: str, body: Object) -> Object:
        """Lay fields over an object (a merge patch)."""
        return self._call("PATCH", path, body=body, content_type="application/merge-patch+json")

    def delete(self, path: str) -> None:
        """Delete an object once what hangs on it is gone; until then it can still be read.

        Without a policy a Job would leave its pods. In the background it would go before them, and
        a new Job of its name would meet them: same folder in the store, same host names.
        """
        self._call("DELETE", path, params={"propagationPolicy": "Foreground"})

    def watch(
        self, path: str, *, version: str, on_open: Callable[[], None], **params: str
    ) -> Iterator[Object]:
        """Changes since `version`, each `{type, object}`, until the server ends the stream.

        Raises:
            ApiError: status 410: `version` is too old, list again.
            Unreachable: the connection broke or went silent.
        """
        asked = {
            **params,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
        }
        for line in self.stream(path, params=asked, silence_s=SILENCE_S, on_open=on_open):
            change = json.loads(line)
            if change["type"] == "ERROR":
                raise _api_error(change["object"].get("code", 500), change["object"], path)
            yield change

    def stream(
        self,
        path: str,
        *,
        params: Mapping[str, str],
        silence_s: float,
        on_open: Callable[[], None] | None = None,
    ) -> Iterator[str]:
        """Lines of an answer that comes bit by bit."""
        timeout = httpx.Timeout(self._patience.timeout_s, read=silence_s)
        try:
            with self._http.stream(
                "GET",
                path,
                params=dict(params),
                headers=self.access.headers(),
                timeout=timeout,
                extensions=self.access.tls_extensions(),
            ) as answer:
                self._check(answer, path)
                if on_open:
                    on_open()
                yield from _whole_lines(answer)
        except httpx.HTTPError as error:
            raise _unreachable(self.access, error) from None

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        content = None if body is None else json.dumps(body)
        pause = self._patience.first_pause_s
        give_up_at = time.monotonic() + self._patience.total_s
        for left in reversed(range(self._patience.tries)):
            try:
                answer = self._http.request(
                    method,
                    path,
                    params=dict(params or {}),
                    content=content,
                    headers={**self.access.headers(), "Content-Type": content_type},
                    extensions=self.access.tls_extensions(),
                )
                self._check(answer, path)
                found: Object = answer.json()
                return found
            except httpx.HTTPError as error:
                trouble, hopeless = _unreachable(self.access, error), _hopeless(error)
            except ApiUnavailable as busy:
                trouble, hopeless = busy, False
                pause = max(pause, busy.pause_s)
            if hopeless or not left or time.monotonic() + pause >= give_up_at:
                raise trouble
            if self._patience.tell and left == self._patience.tries - 1:
                self._patience.tell(f"{trouble.what}; trying again")
            time.sleep(pause)
            pause = min(2 * pause, 8.0)
        raise AssertionError("the last try returns or raises")

    def _check(self, answer: httpx.Response, path: str) -> None:
        if answer.is_success:
            return
        answer.read()
        try:
            said = answer.json()
        except ValueError:
            said = {"message": answer.text[:200]}
        error = _api_error(answer.status_code, said, path)
        if answer.status_code == 401 and self.access.forget_credential():
            raise ApiUnavailable(
                error.what, where=self.access.server
            )  # a plugin may have a fresh one
        busy = answer.status_code == 429 or answer.status_code in (500, 502, 503, 504)
        # Two writers met at the quota's counter; the other 409, AlreadyExists, is final.
        if busy or (answer.status_code == 409 and "resourcequotas" in error.what):
            raise ApiUnavailable(error.what, where=self.access.server, pause_s=_retry_after(answer))
        raise error


_CLUSTER_WIDE = ("nodes", "priorityclasses", "selfsubjectaccessreviews")


class ApiUnavailable(Unreachable):
    """The API asks to be asked again, not before `pause_s` have passed."""

    def __init__(self, what: str, *, where: str, pause_s: float = 0.0) -> None:
        super().__init__(what, where=where, remedy="try again later")
        self.pause_s = pause_s


def connect(*, context: str | None = None, namespace: str | None = None) -> Cluster:
    """The cluster of the kubeconfig's context, or the one that this pod runs in."""
    access = load_access(context=context, namespace=namespace)
    return Cluster(access, patience=RetryPolicy(tell=say))


def _open_http(access: Access, *, timeout_s: float) -> httpx.Client:
    try:
        transport = httpx.HTTPTransport(
            verify=access.ssl_context() if access.server.startswith("https") else False,
            proxy=access.proxy(),
            socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )
    except (OSError, ValueError, ImportError) as error:
        # A certificate or key that is none, or a proxy that httpx cannot speak to.
        what = f"cannot connect as the kubeconfig says ({error})"
        raise TitaError(what, where=access.server, remedy="mend the kubeconfig") from None
    return httpx.Client(
        base_url=access.server,
        transport=transport,
        timeout=timeout_s,
        headers={"User-Agent": "tita", "Accept": "application/json"},
    )


def _whole_lines(answer: httpx.Response) -> Iterator[str]:
    rest = b""
    for chunk in answer.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", errors="replace")
    if rest:  # a container may end in the middle of a line
        yield rest.decode("utf-8", errors="replace")


def _api_error(status: int, said: Mapping[str, Any], path: str) -> ApiError:
    error = ApiError(status, said.get("reason", ""), said.get("message", ""), where=path)
    if status == 401:
        error.remedy = "log in to the cluster again"
    elif status == 403 and " cannot " in error.what:  # no right; admission also answers 403
        error.remedy = "ask an administrator for the chart's launcher Role (rbac.subjects)"
    return error


def _retry_after(answer: httpx.Response) -> float:
    try:
        return min(float(answer.headers.get("Retry-After", 0)), 30.0)
    except ValueError:
        return 0.0


def _unreachable(access: Access, error: Exception) -> Unreachable:
    words = str(error) or type(error).__name__
    remedy = "check the network, the VPN and `kubectl get pods`"
    if "CERTIFICATE_VERIFY_FAILED" in words:
        remedy = "check certificate-authority and server in the kubeconfig"
    return Unreachable(
        f"the cluster's API gives no answer ({words})", where=access.server, remedy=remedy
    )


def _hopeless(error: Exception) -> bool:
    """Another try would end the same way."""
    unknown = isinstance(error, httpx.UnsupportedProtocol)
    return unknown or "CERTIFICATE_VERIFY_FAILED" in str(error)
