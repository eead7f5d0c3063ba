"""Runs the embedded S3 server and the pod of `helm test` as rendered."""

import base64
import ipaddress
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
from botocore.exceptions import ClientError

from tests import s3_server
from tests.s3_server import KEYS, S3Server, free_ports, run_weed
from tita.demo.models import demo_model_path
from tita.gang import free_port


class EmbeddedStore(NamedTuple):
    """The processes of the two containers of the embedded store."""

    store: "subprocess.Popen[bytes]"
    s3: S3Server
    ports: dict[str, int]
    """By option; `admin` listens on two further ports, which are not given."""

    def stop(self) -> None:
        """Stop both as the kubelet does; they must exit within the grace period."""
        for process in (self.s3.process, self.store):
            process.terminate()
        for process in (self.s3.process, self.store):
            process.wait(timeout=25)


def containers(chart: SimpleNamespace) -> dict[str, dict[str, Any]]:
    statefulset = chart.find(chart.render(files=("trial",)), "StatefulSet", "tita-s3")
    return {c["name"]: c for c in statefulset["spec"]["template"]["spec"]["containers"]}


def certificate(chart: SimpleNamespace, folder: Path) -> Path:
    """The folder with the certificate that the chart generates."""
    folder.mkdir(exist_ok=True)
    secret = chart.find(chart.render(files=("trial",)), "Secret", "tita-s3-grpc")
    for name, value in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(value))
    return folder


def start(chart: SimpleNamespace, folder: Path) -> EmbeddedStore:
    """Run the rendered commands with a local directory and free ports, and nothing else changed."""
    (folder / "data").mkdir(exist_ok=True)
    tls = str(certificate(chart, folder / "tls"))
    ports = free_ports("master.port", "volume.port", "filer.port", "port", "port.grpc")
    local = {
        "-dir=/data": f"-dir={folder / 'data'}",
        "-filer=127.0.0.1:8888": f"-filer=127.0.0.1:{ports['filer.port']}",
    }

    def run(name: str, *options: str) -> "subprocess.Popen[bytes]":
        found = containers(chart)[name]
        assert found["command"] == ["/usr/bin/weed"]
        values = {n: v for n, v in chart.environment(found).items() if isinstance(v, str)}
        environment = {n: v.replace("/etc/weed", tls) for n, v in values.items() if n != "HOME"}
        keys = {n: v for n, v in KEYS.items() if n in chart.environment(found)}
        arguments = [local.get(a, a) for a in found["args"] if not a.startswith("-port=")]
        given = [f"-{option}={ports[option]}" for option in options]
        return run_weed(folder, *arguments, *given, **environment, **keys)

    store = run("store", "master.port", "volume.port", "filer.port")
    s3 = S3Server(run("s3", "port", "port.grpc"), f"http://127.0.0.1:{ports['port']}")
    try:
        s3.wait_until_ready("tita")
    except AssertionError:
        store.kill()
        raise
    return EmbeddedStore(store, s3, ports)


@pytest.fixture(scope="module")
def embedded(
    chart: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedStore]:
    """The embedded store after a restart, with an object written before."""
    folder = tmp_path_factory.mktemp("embedded")
    first = start(chart, folder)
    first.s3.client().put_object(Bucket="tita", Key="kept", Body=b"kept")
    first.stop()
    running = start(chart, folder)  # on other ports, as a new pod has another address
    yield running
    running.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(embedded: EmbeddedStore) -> S3Server:
    return embedded.s3


def test_the_embedded_store_keeps_objects_over_a_restart(server: S3Server) -> None:
    assert server.client().get_object(Bucket="tita", Key="kept")["Body"].read() == b"kept"


def test_the_readiness_probes_of_the_embedded_store_succeed(
    chart: SimpleNamespace, embedded: EmbeddedStore
) -> None:
    path = containers(chart)["s3"]["readinessProbe"]["httpGet"]["path"]
    with urllib.request.urlopen(embedded.s3.url + path, timeout=60) as answer:
        assert answer.status == 200
    for probe in ("readinessProbe", "livenessProbe"):
        program, *arguments = containers(chart)["store"][probe]["exec"]["command"]
        assert program == "curl", "the image has curl"
        url = arguments[-1].replace(":8888", f":{embedded.ports['filer.port']}")
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200


def test_the_embedded_store_has_its_bucket_and_checks_keys(server: S3Server) -> None:
    assert [b["Name"] for b in server.client().list_buckets()["Buckets"]] == ["tita"]
    server.client().put_object(Bucket="tita", Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        server.client().put_object(Bucket="tita", Key="once", Body=b"2", IfNoneMatch="*")
    with pytest.raises(ClientError, match=r"403|SignatureDoesNotMatch|AccessDenied"):
        server.client(AWS_SECRET_ACCESS_KEY="wrong").list_buckets()


def test_the_embedded_store_listens_on_its_container_port(chart: SimpleNamespace) -> None:
    (port,) = containers(chart)["s3"]["ports"]
    assert f"-port={port['containerPort']}" in containers(chart)["s3"]["args"]
    assert "ports" not in containers(chart)["store"]


def open_ports(process: "subprocess.Popen[bytes]") -> set[int]:
    """The ports on which a process listens for connections from other machines."""
    listening = [
        connection.laddr
        for connection in psutil.Process(process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    return {a.port for a in listening if not ipaddress.ip_address(a.ip).is_loopback}


def test_only_s3_and_a_port_with_certificates_are_open(embedded: EmbeddedStore) -> None:
    """The other ports of SeaweedFS need no credentials, and not every cluster enforces policies."""
    assert open_ports(embedded.store) == set()
    assert open_ports(embedded.s3.process) == {embedded.ports["port"], embedded.ports["port.grpc"]}


def answers_grpc(port: int, *, keys: Path | None) -> bool:
    """Whether the port accepts HTTP/2 over TLS from a client with this certificate, or without."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if keys:
        context.load_cert_chain(keys / "tls.crt", keys / "tls.key")
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
            context.wrap_socket(connection) as secure,
        ):
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4] + [0] * 5))
            return bool(secure.recv(9))  # TLS 1.3 reports a missing certificate here
    except (ssl.SSLError, ConnectionResetError):
        return False


def test_the_grpc_port_of_the_gateway_needs_the_certificate(
    chart: SimpleNamespace, embedded: EmbeddedStore, tmp_path: Path
) -> None:
    port = embedded.ports["port.grpc"]
    assert answers_grpc(port, keys=certificate(chart, tmp_path))
    assert not answers_grpc(port, keys=None)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4] + [0] * 5))
        assert not plain.recv(9).startswith(b"\x00\x00"), "plain HTTP/2 is accepted"


def test_the_server_of_the_tests_listens_on_loopback(tmp_path: Path) -> None:
    with s3_server.seaweedfs(tmp_path):
        servers = [each for each in psutil.Process().children() if each.name() == "weed"]
        process = max(servers, key=psutil.Process.create_time)
        assert open_ports(process) == set()


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The inference server, with the demo's tiny models."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("inference") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tita", "serve", f"--base={demo_model_path('base')}",
             f"--reward={demo_model_path('reward')}", f"--port={port}", "--grace-s=1"],
            env={**os.environ, "TITA_API_KEYS": "first,second"},
            stdout=out, stderr=out,
        )  # fmt: skip
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=2).close()
            break
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait(timeout=60)


def release_test(
    chart: SimpleNamespace, server: S3Server, inference: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the command of the `helm test` pod with its environment and local addresses."""
    values = {"inference.auth.existingSecret": "keys"}
    pod = chart.find(chart.render(values, files=("trial",)), "Pod", "tita-test")
    (test,) = pod["spec"]["containers"]
    secrets = {**KEYS, "TITA_API_KEYS": "first,second", "HOSTNAME": "tita-test"}
    env = {"PATH": os.environ["PATH"], **{n: secrets[n] for n in ("HOSTNAME",)}}
    for name, value in chart.environment(test).items():
        if isinstance(value, str):
            value = value.replace("http://tita-s3:8333", server.url)
            env[name] = value.replace("http://tita-inference:8000", inference)
        elif name in secrets:
            env[name] = secrets[name]
    env |= {"HOME": "/tmp", **changes}
    command = [sys.executable, *test["command"][1:]]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_test_pod_is_configured_like_the_benchmark(chart: SimpleNamespace) -> None:
    """It has the benchmark's scheduling, proxies, certificates and cloud identity."""
    identity = {"azure.workload.identity/use": "true"}
    values = {"jobs.podLabels": identity, "jobs.perJob.benchmark.nodeSelector": {"pool": "cpu"}}
    pods = dict(chart.pod_templates(chart.render(values, files=("full",))))
    test, job = pods["Pod/tita-test"], pods["CronJob/tita-benchmark"]
    assert identity.items() <= test["metadata"]["labels"].items()
    assert test["spec"]["nodeSelector"] == {"gpu": "h100", "pool": "cpu"}
    for key in ("nodeSelector", "tolerations", "topologySpreadConstraints", "priorityClassName"):
        assert test["spec"][key] == job["spec"][key]
    (tester,), (worker,) = test["spec"]["containers"], job["spec"]["containers"]
    assert chart.environment(tester)["NCCL_DEBUG"] == chart.environment(worker)["NCCL_DEBUG"]
    assert "/etc/ssl/private-ca" in {mount["mountPath"] for mount in tester["volumeMounts"]}


def test_helm_test_uses_the_store_and_inference(
    chart: SimpleNamespace, server: S3Server, inference: str
) -> None:
    # Any file of keys that the server accepts.
    keys = "# of the team\nfirst tita=0.3,second\n"
    done = release_test(chart, server, inference, TITA_API_KEYS=keys)
    assert done.returncode == 0, done.stderr
    assert "wrote, read and deleted s3://tita/helm-test/tita-test" in done.stdout
    assert re.search(r"^inference: '.+'$", done.stdout, re.MULTILINE)
    listed = server.client().list_objects_v2(Bucket="tita", Prefix="helm-test/")
    assert listed["KeyCount"] == 0


def test_helm_test_fails_with_wrong_keys(
    chart: SimpleNamespace, server: S3Server, inference: str
) -> None:
    closed = release_test(chart, server, inference, TITA_API_KEYS="wrong")
    assert closed.returncode != 0
    assert "401" in closed.stderr
    locked = release_test(chart, server, inference, AWS_SECRET_ACCESS_KEY="wrong")
    assert locked.returncode != 0
    assert locked.stderr.startswith("store: ")
    assert "Traceback" not in locked.stderr
