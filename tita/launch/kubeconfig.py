"""How to reach a cluster: the kubeconfig as kubectl reads it, or a pod's service account.

The official client does this too, but importing it takes half a second and 70 MB, and a launcher
is judged by the time from Enter to the Job. A test compares the two on the same files.
https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/
"""

import base64
import json
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tita.errors import TitaError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(kw_only=True)
class Access:
    """One cluster as one user: where, as whom, and in which namespace."""

    server: str
    namespace: str
    context: str
    cluster: Mapping[str, Any] = field(default_factory=dict, repr=False)
    user: Mapping[str, Any] = field(default_factory=dict, repr=False)
    folder: Path = Path()
    """Where the kubeconfig lies: paths in it start there."""
    _plugin: dict[str, Any] = field(default_factory=dict, repr=False)
    _rejected: str = field(default="", repr=False)

    def ssl_context(self) -> ssl.SSLContext:
        """Whom to trust, and our own certificate if that is how the user is known."""
        context = ssl.create_default_context(
            cafile=self._path("certificate-authority"),
            cadata=_decode(self.cluster.get("certificate-authority-data")),
        )
        if self.cluster.get("insecure-skip-tls-verify"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate, key = self._client_pair()
        if certificate and key:
            with tempfile.TemporaryDirectory() as folder:  # the ssl module reads files only
                paths = [Path(folder) / "crt", Path(folder) / "key"]
                for path, content in zip(paths, (certificate, key), strict=True):
                    path.touch(mode=0o600)
                    path.write_text(content)
                context.load_cert_chain(paths[0], str(paths[1]))
        return context

    def headers(self) -> dict[str, str]:
        """Who asks; read anew each time, because tokens are rotated."""
        if path := self.user.get("tokenFile"):
            return {"Authorization": f"Bearer {_read(self.folder / path).strip()}"}
        if token := self.user.get("token"):
            return {"Authorization": f"Bearer {token}"}
        if "exec" in self.user and (token := self._credential().get("token")):
            return {"Authorization": f"Bearer {token}"}
        if name := self.user.get("username"):
            pair = f"{name}:{self.user.get('password', '')}"
            return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
        return {}

    def proxy(self) -> str | None:
        """The proxy on the way: the kubeconfig's, or the environment's as kubectl takes it."""
        given: str | None = self.cluster.get("proxy-url")
        return given or _environment_proxy(self.server)

    def tls_extensions(self) -> dict[str, str]:
        """What httpx is to be told of this connection: another name on the server's certificate."""
        name = self.cluster.get("tls-server-name")
        return {"sni_hostname": name} if name else {}

    def forget_credential(self) -> bool:
        """The API did not take the credential; whether it is worth while to come with a new one."""
        rejected = self._plugin.get("token", "")
        self._plugin = {}
        again = bool(rejected) and rejected != self._rejected
        self._rejected = rejected
        return again

    def _client_pair(self) -> tuple[str | None, str | None]:
        if "exec" in self.user:
            given = self._credential()
            return given.get("clientCertificateData"), given.get("clientKeyData")
        pair = []
        for name in ("client-certificate", "client-key"):
            path = self.user.get(name)
            data = _decode(self.user.get(f"{name}-data"))
            pair.append(data or (_read(self.folder / path) if path else None))
        return pair[0], pair[1]

    def _path(self, name: str) -> str | None:
        path = self.cluster.get(name)
        return str(self.folder / path) if path else None

    def _credential(self) -> dict[str, Any]:
        expires = self._plugin.get("expirationTimestamp")
        if not self._plugin or (expires and _seconds_to(expires) < 30):
            self._plugin = _run_plugin(self.user["exec"], self)
        return self._plugin


def load_access(*, context: str | None = None, namespace: str | None = None) -> Access:
    """The cluster that kubectl would talk to; inside a pod without a kubeconfig, its own.

    Raises:
        TitaError: no kubeconfig, or it lacks what the context names.
    """
    files = _kubeconfig_files()
    if not files and (SERVICE_ACCOUNT / "token").exists():
        return _own_cluster(namespace)
    if not files:
        raise TitaError("no kubeconfig", remedy="set KUBECONFIG, or add --local to run here")
    entries = _merged(files)
    name = context or entries["current-context"].get("")
    if not name:
        raise TitaError("no current context", where=str(files[0]), remedy="give --context")
    chosen = _named(entries, "contexts", name, remedy="choose one of `kubectl config get-contexts`")
    cluster = _named(entries, "clusters", chosen["context"].get("cluster", ""))
    user_name = chosen["context"].get("user", "")
    user = _named(entries, "users", user_name)["user"] if user_name else {}
    if "auth-provider" in user:
        raise TitaError(
            "auth-provider is a way that Kubernetes gave up in 1.26",
            where=f"user {user_name}",
            remedy="use your cloud's exec plugin",
        )
    return Access(
        server=cluster["cluster"]["server"].rstrip("/"),
        namespace=namespace or chosen["context"].get("namespace") or "default",
        context=name,
        cluster=cluster["cluster"],
        user=user or {},
        folder=cluster["folder"],
    )


def _own_cluster(namespace: str | None) -> Access:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    return Access(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=namespace or _read(SERVICE_ACCOUNT / "namespace").strip(),
        context="service account",
        cluster={"certificate-authority": str(SERVICE_ACCOUNT / "ca.crt")},
        user={"tokenFile": str(SERVICE_ACCOUNT / "token")},
    )


def _kubeconfig_files() -> list[Path]:
    given = os.environ.get("KUBECONFIG")
    listed = given.split(os.pathsep) if given else ["~/.kube/config"]
    return [path for name in listed if name and (path := Path(name).expanduser()).is_file()]


def _merged(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Entries of all files by kind and name; the first file that has one wins."""
    merged: dict[str, dict[str, Any]] = {
        kind: {} for kind in ("clusters", "users", "contexts", "current-context")
    }
    for file in files:
        try:
            content = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TitaError(f"not YAML ({error})", where=str(file)) from None
        if not isinstance(content, dict):
            raise TitaError("not a kubeconfig", where=str(file))
        for kind in ("clusters", "users", "contexts"):
            for entry in content.get(kind) or []:
                merged[kind].setdefault(entry["name"], {**entry, "folder": file.parent})
        if current := content.get("current-context"):
            merged["current-context"].setdefault("", current)
    return merged


def _named(
    entries: Mapping[str, Mapping[str, Any]], kind: str, name: str, *, remedy: str | None = None
) -> dict[str, Any]:
    if name not in entries[kind]:
        raise TitaError(f"the kubeconfig has no {kind[:-1]} {name!r}", remedy=remedy)
    found: dict[str, Any] = entries[kind][name]
    return found


def _run_plugin(spec: Mapping[str, Any], access: Access) -> dict[str, Any]:
    """https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins"""
    command = spec["command"]
    path = str(access.folder / command) if "/" in command else command
    asked: dict[str, Any] = {"interactive": False}
    if spec.get("provideClusterInfo"):
        asked["cluster"] = {k: v for k, v in access.cluster.items() if k in _TOLD_TO_PLUGINS}
    info = {"apiVersion": spec["apiVersion"], "kind": "ExecCredential"}
    environment = {pair["name"]: pair["value"] for pair in spec.get("env") or []}
    environment["KUBERNETES_EXEC_INFO"] = json.dumps({**info, "spec": asked})
    try:
        done = subprocess.run(
            [path, *(spec.get("args") or [])],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        )
        status: dict[str, Any] = json.loads(done.stdout)["status"]
    except FileNotFoundError:
        hint = spec.get("installHint") or "install it"
        raise TitaError("no such credential plugin", where=command, remedy=hint) from None
    except (subprocess.SubprocessError, ValueError, KeyError) as error:
        raise TitaError(
            f"the credential plugin failed ({type(error).__name__})",
            where=command,
            remedy="log in again, or try `kubectl get pods`",
        ) from None
    return status


_TOLD_TO_PLUGINS = (
    "server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data",
    "proxy-url",
)  # fmt: skip


def _environment_proxy(server: str) -> str | None:
    """As Go's programs read the environment: NO_PROXY may hold networks, and loopback is direct.

    https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config
    """
    from urllib.request import getproxies_environment, proxy_bypass

    parts = urlsplit(server)
    host = parts.hostname or ""
    proxies = getproxies_environment()
    found = proxies.get(parts.scheme)
    if not found or host == "localhost" or proxy_bypass(host):
        return None
    try:
        address = ip_address(host)
    except ValueError:
        return found
    networks = [name.strip() for name in proxies.get("no", "").split(",") if "/" in name]
    near = address.is_loopback or any(address in ip_network(n, strict=False) for n in networks)
    return None if near else found


def _seconds_to(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp() - time.time()


def _decode(data: str | None) -> str | None:
    return base64.b64decode(data).decode() if data else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise TitaError(f"cannot read ({error.strerror})", where=str(path)) from None
