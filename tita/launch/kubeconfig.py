"""The API client for the cluster that kubectl would use: a kubeconfig's context, or the pod's own.

The official client reads files, credentials and certificates. Each function below adds one thing
that kubectl does and client 36.0.3 does not; its docstring names the gap.
"""

import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
import yaml
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, incluster_config, load_incluster_config
from kubernetes.config.kube_config import ConfigNode, KubeConfigLoader, KubeConfigMerger
from urllib3.connection import HTTPConnection
from urllib3.contrib.socks import SOCKSProxyManager

from tita.errors import TitaError
from tita.launch.scope import CommandScope

_CHECK = "check it with `kubectl config view`, or set KUBECONFIG to another file"
# Of the fields that are read here, or that the client reads without a check.
_TYPES: dict[str, type] = dict.fromkeys(
    ("cluster", "namespace", "proxy-url", "server", "tokenFile", "user"), str
)
_TYPES["exec"] = dict
# Connections that are kept: one log stream per pod. Beyond it, urllib3 warns for each connection.
_POOL_SIZE = 1024


class NoKubeconfig(TitaError):
    """There is no kubeconfig, and this is not a pod."""


@dataclass(frozen=True, kw_only=True)
class ClusterAccess:
    """An API client for one cluster as one user, and the default namespace."""

    client: ApiClient
    namespace: str
    load_credential: Callable[[], None] = field(default=lambda: None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def server(self) -> str:
        return str(self.client.configuration.host)

    def renew_credential(self, rejected: str) -> bool:
        """Load the credential again after 401; False if it is still the `rejected` one.

        The client runs exec plugins again on expiry only, and never reads a token file again
        (https://github.com/kubernetes-client/python/issues/741).
        """
        tokens = self.client.configuration.api_key
        with self._lock, suppress(TitaError, ConfigException, OSError):
            if tokens.get("BearerToken", "").strip() == rejected:
                self.load_credential()
        return bool(tokens.get("BearerToken", "").strip() != rejected)


def load_access(*, context: str | None = None, namespace: str | None = None) -> ClusterAccess:
    """The cluster that kubectl would talk to; in a pod without a kubeconfig, the pod's own.

    Raises:
        NoKubeconfig: there is none, and this is not a pod.
        TitaError: the kubeconfig is invalid, or its credential plugin fails.
    """
    # The client reads KUBECONFIG at import, and rejects empty files.
    names = (os.environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep)
    paths = [Path(name).expanduser() for name in names if name]
    files = [str(path) for path in paths if path.is_file() and path.stat().st_size]
    configuration, proxy_url = Configuration(), None
    if files:
        where = os.pathsep.join(files)
        config, current = _merge(files)
        name = context or current
        if not name:
            raise TitaError("no current context", where=files[0], remedy="set --context")
        chosen = _entry(config, "contexts", name, where=where)
        if not chosen.get("cluster"):
            raise TitaError(f"context {name!r} names no cluster", where=where, remedy=_CHECK)
        cluster = _entry(config, "clusters", chosen["cluster"], where=where)
        if not cluster.get("server"):
            raise TitaError(
                f"cluster {chosen['cluster']!r} has no server",
                where=where,
                remedy="add its address to the kubeconfig",
            )
        user = _entry(config, "users", chosen["user"], where=where) if chosen.get("user") else {}
        loader = KubeConfigLoader(config, active_context=name, config_base_path=None)
        check = CommandScope(context=context, namespace=namespace).kubectl("get", "pods")
        load = partial(_load_kubeconfig, loader, user, configuration, where=where, check=check)
        namespace = namespace or chosen.get("namespace") or "default"
        proxy_url = cluster.get("proxy-url")
    elif os.path.isfile(incluster_config.SERVICE_TOKEN_FILENAME):
        load = partial(load_incluster_config, client_configuration=configuration)
        file = Path(incluster_config.SERVICE_TOKEN_FILENAME).with_name("namespace")
        namespace = namespace or file.read_text().strip()  # the client does not read it
    else:
        where = os.pathsep.join(str(path) for path in paths)
        raise NoKubeconfig("no kubeconfig", where=where, remedy="set KUBECONFIG")
    try:
        load()
    except (ConfigException, OSError) as error:
        raise TitaError(
            _without_entry(str(error)),
            where=where if files else "this pod's service account",
            remedy="log in to the cluster again, or fix the kubeconfig"
            if files
            else "mount its token, or set KUBECONFIG",
        ) from None
    client = open_client(configuration, proxy_url=proxy_url)
    return ClusterAccess(client=client, namespace=namespace, load_credential=load)


def _merge(files: list[str]) -> tuple[ConfigNode, str]:
    """The merged kubeconfig and its current context: the first file that sets one wins.

    `KubeConfigMerger` takes the last one.
    """
    where = os.pathsep.join(files)
    try:
        merger = KubeConfigMerger(where)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TitaError(f"not YAML ({error})", where=where, remedy=_CHECK) from None
    except (AttributeError, KeyError, TypeError, ConfigException):
        raise TitaError("not a kubeconfig", where=where, remedy=_CHECK) from None
    contexts = (content.get("current-context") for content in merger.config_files.values())
    return merger.config, next(filter(None, contexts), "")


def _entry(config: ConfigNode, kind: str, name: str, *, where: str) -> dict[str, Any]:
    """A named entry. The client sends anonymous requests where the context's user is missing."""
    try:
        found = config[kind].get_with_name(name, safe=True)
    except ConfigException:
        raise TitaError(f"an entry of {kind} has no name", where=where, remedy=_CHECK) from None
    if found is None:
        remedy = "see `kubectl config get-contexts`"
        if kind != "contexts":
            remedy = f"add it to the kubeconfig, or choose another context: {remedy}"
        raise TitaError(f"the kubeconfig has no {kind[:-1]} {name!r}", where=where, remedy=remedy)
    entry: dict[str, Any] = found.value.get(kind[:-1]) or {}
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key) or type_(), type_) for key, type_ in _TYPES.items()
    ):
        raise TitaError(f"{kind[:-1]} {name!r} is invalid", where=where, remedy=_CHECK)
    found.value[kind[:-1]] = entry
    return entry


def _load_kubeconfig(
    loader: KubeConfigLoader,
    user: dict[str, Any],
    configuration: Configuration,
    *,
    where: str,
    check: str,
) -> None:
    """Load a context, and raise if its exec plugin fails.

    The client logs a plugin's failure, with the user's entry if it is invalid, and goes on without
    a credential (`KubeConfigLoader._load_from_exec_plugin`).

    Args:
        where: the kubeconfig.
        check: the command with which the user can try the same.
    """
    if "auth-provider" in user:
        raise TitaError(
            "auth-provider was removed in Kubernetes 1.26",
            where=where,
            remedy="use your cloud's exec plugin",
        )
    errors: list[str] = []

    def capture(record: logging.LogRecord) -> bool:
        errors.append(record.getMessage())
        return False

    root = logging.getLogger()
    root.addFilter(capture)
    try:
        loader.load_and_set(configuration)
    except ValueError:
        raise TitaError(
            "certificate or key data is not base64",
            where=where,
            remedy="log in to the cluster again, or use files (client-certificate, client-key)",
        ) from None
    finally:
        root.removeFilter(capture)
    if (plugin := user.get("exec")) and errors:
        raise TitaError(
            f"the credential plugin failed ({_without_entry(errors[-1])})",
            where=plugin.get("command") or where,
            remedy=plugin.get("installHint") or f"log in again, or try `{check}`",
        )


def _without_entry(message: str) -> str:
    """The client's message without the entry that it quotes: entries hold secrets."""
    return message.partition(" in ")[0] if message.startswith("Invalid kube-config") else message


def open_client(configuration: Configuration, *, proxy_url: str | None = None) -> ApiClient:
    """An `ApiClient` with keep-alive probes and many connections, and without its own retries."""
    configuration.retries = False
    configuration.connection_pool_maxsize = _POOL_SIZE
    keep_alive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    configuration.socket_options = [*HTTPConnection.default_socket_options, keep_alive]
    if not configuration.verify_ssl:  # set in the kubeconfig; kubectl does not warn either
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    _check_certificates(configuration)
    proxy = proxy_url or environment_proxy(configuration.host)
    try:
        if urllib3.util.parse_url(proxy or "").scheme in ("socks5", "socks5h"):
            configuration.proxy = None  # the client read HTTPS_PROXY
            client = ApiClient(configuration)
            client.rest_client.pool_manager = _socks_manager(client, str(proxy))
            configuration.proxy = proxy
        else:
            _set_proxy(configuration, proxy)
            client = ApiClient(configuration)
    except urllib3.exceptions.HTTPError as error:  # its text may hold the proxy's password
        raise TitaError(
            f"unsupported proxy URL ({type(error).__name__})",
            where=configuration.host,
            remedy="fix proxy-url in the kubeconfig, or HTTPS_PROXY",
        ) from None
    client.user_agent = "tita"
    return client


def _check_certificates(configuration: Configuration) -> None:
    """Report unusable certificates now: the client takes them for failures of each request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if configuration.ssl_ca_cert:
            context.load_verify_locations(configuration.ssl_ca_cert)
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
    except OSError as error:
        raise TitaError(
            f"unusable certificate or key ({error})",
            where=configuration.host,
            remedy="fix certificate-authority or client-certificate in the kubeconfig",
        ) from None


def _set_proxy(configuration: Configuration, proxy: str | None) -> None:
    """Set the proxy, with the credentials of its URL.

    The client ignores `proxy-url` (https://github.com/kubernetes-client/python/issues/2679) and
    credentials in a proxy's URL.
    """
    configuration.proxy, configuration.no_proxy = proxy, ""  # exceptions are applied already
    if proxy and (credentials := urllib3.util.parse_url(proxy).auth):
        configuration.proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(credentials))


def _socks_manager(client: ApiClient, proxy: str) -> SOCKSProxyManager:
    """The client's connection pools through a SOCKS5 proxy, which resolves the server's name.

    The client takes HTTP proxies only. Go resolves names at the proxy for both schemes.
    """
    url = urllib3.util.parse_url(proxy)
    username, _, password = (url.auth or "").partition(":")
    return SOCKSProxyManager(
        f"socks5h://{url.netloc}",
        username=unquote(username) or None,
        password=unquote(password) or None,
        **client.rest_client.pool_manager.connection_pool_kw,
    )


def environment_proxy(server: str) -> str | None:
    """The proxy that the environment sets for `server`, as Go programs read it.

    The client uses HTTP_PROXY for https servers, too, and for loopback addresses
    (https://github.com/kubernetes-client/python/issues/2460); NO_PROXY lacks IPv6 networks.
    https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config
    """
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
    names = [name.strip() for name in proxies.get("no", "").split(",") if "/" in name]
    return None if address.is_loopback or any(_is_in(address, name) for name in names) else found


def _is_in(address: IPv4Address | IPv6Address, network: str) -> bool:
    """Whether an address is in a network such as `10.0.0.0/8`; False for what is no network."""
    try:
        return address in ip_network(network, strict=False)
    except ValueError:
        return False
