"""Runs the embedded S3 server and the pod of `helm test` as rendered."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests import s3_server
from tests.s3_server import KEYS, S3Server
from tita.demo.models import demo_model_path
from tita.gang import free_port


def container(chart: SimpleNamespace) -> dict[str, Any]:
    statefulset = chart.find(chart.render(files=("trial",)), "StatefulSet", "tita-s3")
    (found,) = statefulset["spec"]["template"]["spec"]["containers"]
    return dict(found)


def start(chart: SimpleNamespace, data: Path) -> S3Server:
    """Run the rendered command of the embedded server with local directory, address, ports."""
    command, *arguments = container(chart)["args"]
    assert command == "mini"
    here = [
        argument.replace("-dir=/data", f"-dir={data}").replace("=0.0.0.0", "=127.0.0.1")
        for argument in arguments
        if not argument.startswith("-s3.port=")
    ]
    return s3_server.start(data, *here, bucket="tita")


def stop(server: S3Server) -> None:
    """Stop it as the kubelet does; it must exit within the grace period."""
    server.process.terminate()
    server.process.wait(timeout=25)


@pytest.fixture(scope="module")
def server(chart: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The embedded server after a restart, with an object written before."""
    data = tmp_path_factory.mktemp("embedded")
    first = start(chart, data)
    first.client().put_object(Bucket="tita", Key="kept", Body=b"kept")
    stop(first)
    running = start(chart, data)  # on other ports, as a new pod has another address
    yield running
    stop(running)
    shutil.rmtree(data, ignore_errors=True)


def test_the_embedded_store_keeps_objects_over_a_restart(server: S3Server) -> None:
    assert server.client().get_object(Bucket="tita", Key="kept")["Body"].read() == b"kept"


def test_the_readiness_probe_of_the_embedded_store_succeeds(
    chart: SimpleNamespace, server: S3Server
) -> None:
    path = container(chart)["readinessProbe"]["httpGet"]["path"]
    with urllib.request.urlopen(server.url + path, timeout=5) as answer:
        assert answer.status == 200


def test_the_embedded_store_has_its_bucket_and_checks_keys(server: S3Server) -> None:
    assert [b["Name"] for b in server.client().list_buckets()["Buckets"]] == ["tita"]
    server.client().put_object(Bucket="tita", Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        server.client().put_object(Bucket="tita", Key="once", Body=b"2", IfNoneMatch="*")
    with pytest.raises(ClientError, match=r"403|SignatureDoesNotMatch|AccessDenied"):
        server.client(AWS_SECRET_ACCESS_KEY="wrong").list_buckets()


def test_the_embedded_store_listens_on_its_container_port(chart: SimpleNamespace) -> None:
    (port,) = container(chart)["ports"]
    assert f"-s3.port={port['containerPort']}" in container(chart)["args"]


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
    done = release_test(chart, server, inference)
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
