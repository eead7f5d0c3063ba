"""The Kubernetes API as plain dicts, over the official client, with retries and timeouts."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import urllib3
from kubernetes.client import ApiException
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
)

from tita.errors import TitaError, Unreachable
from tita.launch.kubeconfig import ClusterAccess, load_access
from tita.launch.objects import Object
from tita.launch.scope import CommandScope
from tita.terminal import say

# The server ends a watch after WATCH_S. A frozen server, or one that this machine slept through,
# sends nothing: the connection is closed after SILENCE_S without data.
WATCH_S = 50
SILENCE_S = WATCH_S + 10
PAGE = 500


class ApiError(TitaError):
    """The API refused a request. `status` is HTTP's, `reason` is Kubernetes' own word."""

    def __init__(self, status: int, reason: str, message: str, *, where: str) -> None:
        super().__init__(message or reason or f"HTTP {status}", where=where)
        self.status = status
        self.reason = reason


class ApiUnavailable(Unreachable):
    """The API answered that it cannot serve the request now (429, 5xx)."""

    def __init__(self, what: str, *, where: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what, where=where, remedy="try again later")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How calls are retried: `total_s` bounds a frozen API, `attempts` one that fails at once."""

    attempts: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 15.0
    """Timeout of connecting and of each read."""
    total_s: float = 30.0
    notify: Callable[[str], None] | None = None
    """Receives a message before the first retry."""


class Cluster:
    """One namespace of one cluster. Thread-safe."""

    def __init__(
        self,
        access: ClusterAccess,
        *,
        retry: RetryPolicy | None = None,
        scope: CommandScope | None = None,
    ) -> None:
        self.access = access
        self.namespace = access.namespace
        self.scope = scope or CommandScope()
        self._retry = retry or RetryPolicy()
        self._kueue = ""

    def without_retries(self) -> "Cluster":
        """The same cluster, for callers that have their own retry loop."""
        retry = replace(self._retry, attempts=1, notify=None)
        return Cluster(self.access, retry=retry, scope=self.scope)

    def path(
        self, resource: str, name: str | None = None, *, sub: str = "", all_namespaces: bool = False
    ) -> str:
        """The URL path of objects: `jobs.batch`, `pods`, `nodes`, ... as kubectl names them.

        Args:
            resource: their kind.
            name: of one object; None for all. An empty one would delete all instead of one.
            sub: subresource of the object.
            all_namespaces: the objects of all namespaces.

        Raises:
            TitaError: the name cannot be that of an object.
        """
        if name is not None and not _OBJECT_NAME.fullmatch(name):
            raise TitaError(
                f"{name!r} cannot be the name of an object",
                where=resource,
                remedy="use a-z, 0-9, - and ., with a letter or digit at both ends",
            )
        plural, _, group = resource.partition(".")
        version = self._kueue_version() if group == "kueue.x-k8s.io" else "v1"
        root = f"/apis/{group}/{version}" if group else "/api/v1"
        everywhere = all_namespaces or plural in _CLUSTER_SCOPED
        scope = "" if everywhere else f"/namespaces/{quote(self.namespace)}"
        tail = "".join(f"/{quote(part)}" for part in (plural, name, sub) if part)
        return f"{root}{scope}{tail}"

    def _kueue_version(self) -> str:
        """The API version that Kueue prefers; it is still in beta and changes between releases."""
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
        """All objects, read page by page, and the resourceVersion to start a watch from."""
        while True:
            items: list[Object] = []
            token = ""
            try:
                while True:
                    page = {**params, "limit": str(PAGE)} | ({"continue": token} if token else {})
                    answer = self._call("GET", path, params=page)
                    if not isinstance(answer.get("metadata"), dict):
                        raise self._unreachable("the response is not a list of objects")
                    items += answer.get("items") or []
                    token = answer["metadata"].get("continue") or ""
                    if not token:
                        return items, answer["metadata"].get("resourceVersion", "")
            except ApiError as error:
                if error.status != 410 or not token:  # the continue token expired: start again
                    raise

    def create(self, path: str, body: Object, **params: str) -> Object:
        """Create an object. A retry after a lost response answers 409 AlreadyExists."""
        return self._call("POST", path, params={"fieldValidation": "Strict", **params}, body=body)

    def patch(self, path: str, body: Object) -> Object:
        """Apply a JSON merge patch."""
        return self._call("PATCH", path, body=body, content_type="application/merge-patch+json")

    def delete(self, path: str) -> None:
        """Delete an object in the foreground: it stays readable until its dependents are gone.

        Without a policy a Job's pods are orphaned. With background deletion a new Job of the same
        name could run beside the old pods, with the same host names and the same store folder.
        """
        self._call("DELETE", path, params={"propagationPolicy": "Foreground"})

    def watch(
        self, path: str, *, version: str, on_open: Callable[[], None], **params: str
    ) -> Iterator[Object]:
        """Changes since `version`, each `{type, object}`, until the server ends the watch.

        Raises:
            ApiError: status 410: `version` is too old, list again.
            Unreachable: the connection broke or was silent for too long.
        """
        query = {
            **params,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
        }
        for line in self.stream(path, params=query, silence_s=SILENCE_S, on_open=on_open):
            change = self._parse(line)
            if not isinstance(change.get("object"), dict) or "type" not in change:
                raise self._unreachable("the response is not a watch event")
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
        """The lines of a streamed response."""
        with closing(self._open("GET", path, params=params, read_timeout_s=silence_s)) as response:
            if on_open:
                on_open()
            rest = b""
            try:
                for chunk in response.stream(None):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield line.decode("utf-8", errors="replace")
            except urllib3.exceptions.HTTPError as error:
                raise self._unreachable(str(error)) from None
            if rest:  # a container may end in the middle of a line
                yield rest.decode("utf-8", errors="replace")

    def _call(self, method: str, path: str, **request: Any) -> Object:
        """One request, retried as the policy says; the parsed response."""
        policy = self._retry
        exponential = wait_exponential(multiplier=policy.first_wait_s, max=8.0)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(exponential(state), getattr(error, "retry_after_s", 0.0))

        def notify(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if policy.notify and state.attempt_number == 1 and isinstance(error, TitaError):
                policy.notify(f"{error.what}; trying again")

        retrying = Retrying(
            stop=stop_after_attempt(policy.attempts) | stop_before_delay(policy.total_s),
            wait=wait,
            retry=retry_if_exception(_is_transient),
            before_sleep=notify,
            reraise=True,
        )
        return retrying(self._call_once, method, path, **request)

    def _call_once(self, method: str, path: str, **request: Any) -> Object:
        with closing(self._open(method, path, **request)) as response:
            try:
                data = response.data
            except urllib3.exceptions.HTTPError as error:
                raise self._unreachable(str(error)) from None
            return self._parse(data)

    def _parse(self, data: str | bytes) -> Object:
        """A JSON object; a proxy at which users log in answers with a page, or with other JSON."""
        try:
            found = json.loads(data)
        except ValueError:
            raise self._unreachable("the response is not JSON") from None
        if not isinstance(found, dict):
            raise self._unreachable("the response is not a JSON object")
        return found

    def _open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        read_timeout_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, again with a renewed credential after 401; the response before its body.

        It is renewed once: a plugin may make a new token each time for a user whom the server
        never accepts.

        `ApiClient.request` and not `call_api`, which raises AttributeError after a TLS failure: it
        decodes the body of an `ApiException` that has none (`ApiClient.__call_api`).
        """
        client, server = self.access.client, self.access.server
        timeout_s = self._retry.timeout_s
        is_renewed = False
        while True:
            headers = {
                **client.default_headers,
                "Accept": "application/json",
                "Accept-Encoding": "gzip",  # the API compresses long lists
                "Content-Type": content_type,
            }
            client.update_params_for_auth(headers, None, ["BearerToken"])
            token = headers.pop("authorization", "").strip()  # a token file may end with a newline
            try:
                response: urllib3.BaseHTTPResponse = client.request(
                    method,
                    server + path,
                    query_params=dict(params or {}),
                    headers=headers | ({"Authorization": token} if token else {}),
                    body=body,
                    _preload_content=False,
                    _request_timeout=(timeout_s, read_timeout_s or timeout_s),
                )
                return response
            except urllib3.exceptions.HTTPError as error:
                raise self._unreachable(str(error)) from None
            except ApiException as error:
                if error.status == 401 and not is_renewed:
                    is_renewed = self.access.renew_credential(token)
                    if is_renewed:
                        continue
                raise self._refusal(error, path) from None
            except ValueError:  # its message has the header
                raise TitaError(
                    "the token is not a valid HTTP header",
                    where=server,
                    remedy="log in to the cluster again, or fix the token in the kubeconfig",
                ) from None

    def _refusal(self, error: ApiException, path: str) -> TitaError:
        if not error.status:  # the client reports TLS failures as status 0
            return self._unreachable(error.reason)
        try:
            answer = json.loads(error.body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):  # not of the API server, but of a proxy before it
            answer = {"message": error.body.decode("utf-8", errors="replace")[:200]}
        refusal = _api_error(error.status, answer, path)
        unavailable = error.status == 429 or error.status in (500, 502, 503, 504)
        # A conflict at the quota's counter passes; the other 409, AlreadyExists, is final.
        if unavailable or (error.status == 409 and "resourcequotas" in refusal.what):
            return ApiUnavailable(
                refusal.what, where=self.access.server, retry_after_s=_retry_after(error)
            )
        return refusal

    def _unreachable(self, message: str) -> Unreachable:
        # The server's address follows anyway.
        words = " ".join(re.sub(r"^\w+\(host=.*?\): ", "", message).split())
        remedy = f"check the network, the VPN and `{self.scope.kubectl('get', 'pods')}`"
        proxy = self.access.client.configuration.proxy
        if proxy and re.search("proxy|new connection|timed out", words):
            place = urllib3.util.parse_url(proxy)  # without its password
            return Unreachable(
                f"no connection through the proxy {place.host}:{place.port} ({words})",
                where=self.access.server,
                remedy="check proxy-url in the kubeconfig, or HTTPS_PROXY",
            )
        if "CERTIFICATE_VERIFY_FAILED" in words:
            remedy = "check certificate-authority and server in the kubeconfig"
        what = f"the cluster's API does not answer ({words})"
        return Unreachable(what, where=self.access.server, remedy=remedy)


_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_CLUSTER_SCOPED = ("nodes", "priorityclasses", "selfsubjectaccessreviews")


def connect(
    *, context: str | None = None, namespace: str | None = None, release: str | None = None
) -> Cluster:
    """The cluster of the kubeconfig's context, or the one that this pod runs in.

    `release` only completes the commands that messages recommend.
    """
    access = load_access(context=context, namespace=namespace)
    scope = CommandScope(context=context, namespace=namespace, release=release)
    return Cluster(access, retry=RetryPolicy(notify=say), scope=scope)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, Unreachable) and "CERTIFICATE_VERIFY_FAILED" not in error.what


def _api_error(status: int, answer: Mapping[str, Any], path: str) -> ApiError:
    error = ApiError(status, answer.get("reason", ""), answer.get("message", ""), where=path)
    if status == 401:
        error.remedy = "log in to the cluster again"
    elif status == 403 and " cannot " in error.what:  # RBAC; admission controllers send 403, too
        error.remedy = "ask an administrator for the chart's launcher Role (rbac.subjects)"
    return error


def _retry_after(error: ApiException) -> float:
    try:
        return min(float(error.headers.get("Retry-After", 0)), 30.0)
    except ValueError:
        return 0.0
