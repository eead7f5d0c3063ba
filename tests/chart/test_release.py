"""What runs in a release is run here: the embedded S3 server as rendered, and `helm test`'s pod."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tita.demo.models import demo_model_path

KEYS = {"AWS_ACCESS_KEY_ID": "trial", "AWS_SECRET_ACCESS_KEY": "a-secret-of-a-trial"}


class Server(NamedTuple):
    """A running embedded S3 server."""

    process: subprocess.Popen[bytes]
    url: str

    def client(self, **keys: str) -> Any:
        keys = keys or KEYS
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"}),
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports: list[int] = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def container(chart: SimpleNamespace) -> dict[str, Any]:
    statefulset = chart.find(chart.render(files=("trial",)), "StatefulSet", "tita-s3")
    (found,) = statefulset["spec"]["template"]["spec"]["containers"]
    return dict(found)


def start(chart: SimpleNamespace, data: Path) -> Server:
    """The embedded server's command as rendered, but for its ports, its folder and this host."""
    weed = Path(sys.executable).with_name("weed")
    ports = free_ports(5)
    names = ("s3.port", "s3.port.grpc", "master.port", "volume.port", "filer.port")
    arguments = [
        argument.replace("-dir=/data", f"-dir={data}").replace("=0.0.0.0", "=127.0.0.1")
        for argument in container(chart)["args"]
        if not argument.startswith("-s3.port=")
    ]
    arguments += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    process = subprocess.Popen(
        [weed, *arguments],
        env={"HOME": str(data), **KEYS},
        cwd=data,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = Server(process, f"http://127.0.0.1:{ports[0]}")
    path = container(chart)["readinessProbe"]["httpGet"]["path"]
    for _ in range(300):
        try:
            urllib.request.urlopen(server.url + path, timeout=2).close()
            server.client().head_bucket(Bucket="tita")
        except (OSError, ClientError):
            assert process.poll() is None, f"weed ended with {process.returncode}"
            time.sleep(0.1)
        else:
            return server
    process.kill()
    raise AssertionError("the embedded S3 server never became ready")


def stop(server: Server) -> None:
    """As the kubelet does; it must be gone well within the grace period."""
    server.process.terminate()
    server.process.wait(timeout=25)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("embedded")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(chart: SimpleNamespace, data: Path) -> Iterator[Server]:
    running = start(chart, data)
    yield running
    if running.process.poll() is None:
        stop(running)


def test_the_embedded_store_has_its_bucket_and_asks_for_keys(server: Server) -> None:
    assert [b["Name"] for b in server.client().list_buckets()["Buckets"]] == ["tita"]
    server.client().put_object(Bucket="tita", Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        server.client().put_object(Bucket="tita", Key="once", Body=b"2", IfNoneMatch="*")
    with pytest.raises(ClientError, match=r"403|SignatureDoesNotMatch|AccessDenied"):
        server.client(**{**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"}).list_buckets()


def test_the_embedded_store_listens_where_its_ports_say(chart: SimpleNamespace) -> None:
    (port,) = container(chart)["ports"]
    assert f"-s3.port={port['containerPort']}" in container(chart)["args"]


def test_the_embedded_store_survives_a_restart(chart: SimpleNamespace, tmp_path: Path) -> None:
    first = start(chart, tmp_path)
    first.client().put_object(Bucket="tita", Key="kept", Body=b"kept")
    stop(first)
    second = start(chart, tmp_path)  # other ports, as a new pod has another address
    try:
        assert second.client().get_object(Bucket="tita", Key="kept")["Body"].read() == b"kept"
    finally:
        stop(second)


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server, with the demo's tiny models."""
    (port,) = free_ports(1)
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
    chart: SimpleNamespace, server: Server, inference: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    """The command of `helm test`'s pod with the pod's environment, pointed at what runs here."""
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


def test_helm_test_goes_through_store_and_inference(
    chart: SimpleNamespace, server: Server, inference: str
) -> None:
    done = release_test(chart, server, inference)
    assert done.returncode == 0, done.stderr
    assert "wrote, read and deleted s3://tita/helm-test/tita-test" in done.stdout
    assert re.search(r"^inference: '.+'$", done.stdout, re.MULTILINE)
    listed = server.client().list_objects_v2(Bucket="tita", Prefix="helm-test/")
    assert listed["KeyCount"] == 0


def test_helm_test_fails_without_the_right_keys(
    chart: SimpleNamespace, server: Server, inference: str
) -> None:
    closed = release_test(chart, server, inference, TITA_API_KEYS="wrong")
    assert closed.returncode != 0
    assert "401" in closed.stderr
    locked = release_test(chart, server, inference, AWS_SECRET_ACCESS_KEY="wrong")
    assert locked.returncode != 0
    assert locked.stderr.startswith("store: ")
    assert "Traceback" not in locked.stderr
