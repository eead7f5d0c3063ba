"""TLS, credentials and proxies, against a TLS server with its own certificate authority."""

import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from fake_api import FakeApi

from tita.errors import ExitCode, TitaError, Unreachable
from tita.gang import free_port
from tita.launch.cluster import ApiError, Cluster, RetryPolicy, connect
from tita.launch.kubeconfig import load_access

Config = dict[str, Any]


class Secure:
    """A cluster behind TLS, and its kubeconfigs."""

    def __init__(self, folder: Path, *names: str, client_certificates: bool = False) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*names).configure_cert(context)
        if client_certificates:
            self.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        self.api = FakeApi(tls=context).start()
        (folder / "ca.crt").write_bytes(self.ca.cert_pem.bytes())

    def trusting(self, **more: Any) -> Config:
        return {"server": self.api.url, "certificate-authority": "ca.crt", **more}

    def cluster(self, cluster: Config, user: Config | None = None) -> Cluster:
        entries = {
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user or {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        }
        (self.folder / "kubeconfig").write_text(yaml.safe_dump(entries))
        return Cluster(load_access(), retry=RetryPolicy(attempts=2, first_wait_s=0.01))


Open = Callable[..., Secure]


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    opened: list[Secure] = []

    def open_one(*names: str, **more: bool) -> Secure:
        opened.append(Secure(tmp_path, *(names or ("127.0.0.1",)), **more))
        return opened[-1]

    yield open_one
    for one in opened:
        one.api.stop()


def answers(cluster: Cluster) -> bool:
    return bool(cluster.get("/version")["gitVersion"])


def test_certificate_authority_by_file_and_data(secure: Open) -> None:
    import base64

    one = secure()
    assert answers(one.cluster(one.trusting()))
    data = base64.b64encode(one.ca.cert_pem.bytes()).decode()
    given = {"server": one.api.url, "certificate-authority-data": data}
    assert answers(one.cluster(given))


def test_untrusted_server_fails_at_once(secure: Open) -> None:
    one = secure()
    wanted = r"SSLError .*CERTIFICATE_VERIFY_FAILED.*certificate-authority"
    with pytest.raises(Unreachable, match=wanted) as caught:
        one.cluster({"server": one.api.url}).get("/version")
    assert "\n" not in caught.value.what, "it is shown before the first retry, too"
    assert answers(one.cluster({"server": one.api.url, "insecure-skip-tls-verify": True}))


def test_tls_server_name(secure: Open) -> None:
    one = secure("kube.internal")
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        one.cluster(one.trusting()).get("/version")
    named = one.cluster(one.trusting(**{"tls-server-name": "kube.internal"}))
    assert answers(named)
    opened = threading.Event()
    watch = named.watch(named.path("pods"), version="100", on_open=opened.set)
    threading.Timer(0.1, lambda: one.api.pod("r", namespace=named.namespace)).start()
    assert next(watch)["object"]["metadata"]["name"] == "r-0-abcde"
    assert opened.is_set()


def test_client_certificate_by_file_and_data(secure: Open) -> None:
    import base64

    one = secure(client_certificates=True)
    mine = one.ca.issue_cert("ada@lab.test")
    certificate = b"".join(blob.bytes() for blob in mine.cert_chain_pems)
    key = mine.private_key_pem.bytes()
    (one.folder / "me.crt").write_bytes(certificate)
    (one.folder / "me.key").write_bytes(key)
    assert answers(
        one.cluster(one.trusting(), {"client-certificate": "me.crt", "client-key": "me.key"})
    )
    inline = {
        "client-certificate-data": base64.b64encode(certificate).decode(),
        "client-key-data": base64.b64encode(key).decode(),
    }
    assert answers(one.cluster(one.trusting(), inline))
    with pytest.raises(Unreachable):
        one.cluster(one.trusting()).get("/version")


def test_invalid_certificate_authority(secure: Open) -> None:
    one = secure()
    (one.folder / "ca.crt").write_text("nonsense")
    with pytest.raises(TitaError, match="fix certificate-authority"):
        one.cluster(one.trusting())


def test_rotated_token_file(secure: Open) -> None:
    one = secure()
    one.api.token = "new"
    (one.folder / "token").write_text("old")
    cluster = one.cluster(one.trusting(), {"tokenFile": "token"})
    with pytest.raises(ApiError, match="log in to the cluster again") as caught:
        cluster.get("/version")
    assert caught.value.status == 401
    (one.folder / "token").write_text("new")
    assert answers(cluster)


def plugin(folder: Path, *statuses: Config) -> Config:
    """A credential plugin that returns one status after the other, then the last one always."""
    script = folder / "plugin.py"
    script.write_text(
        "import json, os, pathlib\n"
        f"statuses, seen = {list(statuses)!r}, pathlib.Path({str(folder / 'asked')!r})\n"
        "number = len(seen.read_text().splitlines()) if seen.exists() else 0\n"
        "with seen.open('a') as file:\n"
        "    print(os.environ['KUBERNETES_EXEC_INFO'], file=file)\n"
        "status = statuses[min(number, len(statuses) - 1)]\n"
        "kind = {'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential'}\n"
        "print(json.dumps({**kind, 'status': status}))\n"
    )
    options = {"apiVersion": "client.authentication.k8s.io/v1", "provideClusterInfo": True}
    return {"exec": {**options, "command": sys.executable, "args": [str(script)]}}


def runs_of_plugin(folder: Path) -> list[Config]:
    """What each run of the plugin was given."""
    return [json.loads(line) for line in (folder / "asked").read_text().splitlines()]


def test_plugin_runs_again_after_401(secure: Open) -> None:
    one = secure()
    one.api.token = "second"
    cluster = one.cluster(
        one.trusting(), plugin(one.folder, {"token": "first"}, {"token": "second"})
    )
    assert answers(cluster)
    runs = runs_of_plugin(one.folder)
    assert len(runs) == 2
    assert runs[0]["spec"]["cluster"]["server"] == one.api.url


def test_plugin_runs_again_when_its_token_expires(secure: Open) -> None:
    one = secure()
    one.api.token = "second"
    expired = {"token": "first", "expirationTimestamp": "2026-01-01T00:00:00Z"}
    valid = {"token": "second", "expirationTimestamp": "2099-01-01T00:00:00Z"}
    cluster = one.cluster(one.trusting(), plugin(one.folder, expired, valid))
    assert answers(cluster)
    assert answers(cluster)
    assert len(runs_of_plugin(one.folder)) == 2
    assert sum("/version" in request for request in one.api.requests) == 2, "no 401 on the way"


@pytest.mark.parametrize("number", [1, 6])
def test_plugin_whose_tokens_stay_rejected(secure: Open, number: int) -> None:
    """Some plugins make a new token each time, as `aws eks get-token` does."""
    one = secure()
    one.api.token = "right"
    tokens = [{"token": f"wrong-{count}"} for count in range(number)]
    cluster = one.cluster(one.trusting(), plugin(one.folder, *tokens))
    with pytest.raises(ApiError, match="log in to the cluster again"):
        cluster.get("/version")
    assert len(runs_of_plugin(one.folder)) == 2


def test_plugin_that_returns_a_client_certificate(secure: Open) -> None:
    one = secure(client_certificates=True)
    mine = one.ca.issue_cert("ada@lab.test")
    status = {
        "clientCertificateData": "".join(blob.bytes().decode() for blob in mine.cert_chain_pems),
        "clientKeyData": mine.private_key_pem.bytes().decode(),
    }
    assert answers(one.cluster(one.trusting(), plugin(one.folder, status)))


def test_plugin_beside_the_kubeconfig(secure: Open) -> None:
    one = secure()
    one.api.token = "t"
    spec = plugin(one.folder, {"token": "t"})
    (one.folder / "run").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (one.folder / "run").chmod(0o755)
    spec["exec"]["command"] = "./run"
    assert answers(one.cluster(one.trusting(), spec))


def test_watch_reconnects_over_tls(secure: Open, tmp_path: Path) -> None:
    one = secure()
    one.cluster(one.trusting())
    one.api.put("jobs.batch", {"metadata": {"name": "r", "namespace": "default"}, "spec": {}})
    process = subprocess.Popen(
        [sys.executable, "-m", "tita", "jobs", "watch", "r"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "scheduling" in process.stderr.readline()
    one.api.cut()
    job = one.api.get("jobs.batch", "r")
    job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    one.api.put("jobs.batch", job)
    _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.OK, told
    assert "r is done" in told


class Proxy:
    """An HTTP proxy for CONNECT that records its targets."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            host, _, port = head.split()[1].decode().rpartition(":")
            self.asked.append(f"{host}:{port}")
            upstream = socket.create_connection(("127.0.0.1", int(port)))
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    def close(self) -> None:
        self._listener.close()


class SocksProxy:
    """A SOCKS5 proxy with a password that records its targets (RFC 1928, RFC 1929)."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.users: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            read = client.makefile("rb").read
            read(read(2)[1])
            client.sendall(b"\x05\x02")
            read(1)
            user, password = read(read(1)[0]).decode(), read(read(1)[0]).decode()
            self.users.append(f"{user}:{password}")
            client.sendall(b"\x01\x00")
            assert read(4)[3] == 3, "the proxy must resolve the name"
            host = read(read(1)[0]).decode()
            port = int.from_bytes(read(2), "big")
            self.asked.append(f"{host}:{port}")
            upstream = socket.create_connection(("127.0.0.1", port))
            client.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_proxy(secure: Open, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    one, proxy = secure("127.0.0.1", "kube.test"), SocksProxy()
    port = one.api.url.rpartition(":")[2]
    url = f"{scheme}://ada:p%40ss@127.0.0.1:{proxy.port}"
    server = f"https://kube.test:{port}"
    assert answers(one.cluster(one.trusting(server=server, **{"proxy-url": url})))
    monkeypatch.setenv("HTTPS_PROXY", url)
    assert answers(one.cluster(one.trusting(server=server)))
    assert (set(proxy.asked), set(proxy.users)) == ({f"kube.test:{port}"}, {"ada:p@ss"})
    proxy.close()


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_proxy_that_does_not_answer_is_named(secure: Open, scheme: str) -> None:
    one, port = secure(), free_port()
    proxy_url = f"{scheme}://ada:secret@127.0.0.1:{port}"
    cluster = one.cluster(one.trusting(**{"proxy-url": proxy_url})).without_retries()
    words = f"no connection through the proxy 127.0.0.1:{port}"
    with pytest.raises(Unreachable, match=words) as raised:
        cluster.get("/version")
    assert "secret" not in str(raised.value)
    assert "check proxy-url in the kubeconfig" in str(raised.value)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        return


def test_proxy_url_and_https_proxy(secure: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one, proxy = secure("127.0.0.1", "kube.test"), Proxy()
    assert answers(one.cluster(one.trusting(**{"proxy-url": proxy.url})))
    port = one.api.url.rpartition(":")[2]
    assert proxy.asked == [f"127.0.0.1:{port}"]
    # kube.test does not resolve: the connection went through the proxy.
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    assert answers(one.cluster(one.trusting(server=f"https://kube.test:{port}")))
    assert proxy.asked[1:] == [f"kube.test:{port}"]
    proxy.close()


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("https://10.1.2.3:6443", None), ("https://11.1.2.3:6443", "http://proxy.test:3128"),
        ("https://kube.lab.test", None), ("https://kube.test", "http://proxy.test:3128"),
        ("https://127.0.0.1:6443", None), ("https://[::1]:6443", None), ("https://localhost", None),
        ("https://[fd00:1::5]:6443", None), ("https://[fd01::5]:6443", "http://proxy.test:3128"),
        ("http://kube.test", "http://plain.test:3128"),
    ],
)  # fmt: skip
def test_no_proxy(
    server: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("HTTP_PROXY", "http://plain.test:3128")
    monkeypatch.setenv("NO_PROXY", "http://lab.test/,10.0.0.0/8,.lab.test,fd00:1::/32")
    entry = {"name": "c", "cluster": {"server": server}}
    context = {"name": "x", "context": {"cluster": "c"}}
    content = {"current-context": "x", "clusters": [entry], "contexts": [context]}
    (tmp_path / "config").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert load_access().client.configuration.proxy == expected


def test_proxy_url_overrides_no_proxy(secure: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one, proxy = secure(), Proxy()
    monkeypatch.setenv("NO_PROXY", "*")
    assert answers(one.cluster(one.trusting(**{"proxy-url": proxy.url})))
    assert len(proxy.asked) == 1
    proxy.close()


def test_unsupported_proxy_scheme(secure: Open) -> None:
    one = secure()
    one.cluster(one.trusting())
    config = one.folder / "kubeconfig"
    config.write_text(config.read_text().replace("server:", "proxy-url: gopher://x\n    server:"))
    with pytest.raises(TitaError, match="fix proxy-url"):
        connect()
