"""A real S3 server for the tests: SeaweedFS in a wheel, which checks secrets and digests.

Registered as a plugin by `conftest.py`; ask for `s3_environment`.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "tests"
KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    for _ in range(600):
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
        except (BotoCoreError, ClientError):
            assert process.poll() is None, f"the S3 server ended with {process.returncode}"
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the S3 server never became ready")


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server that all tests of this session share."""
    folder = tmp_path_factory.mktemp("s3")
    names = ("s3.port", "s3.port.grpc", "master.port", "volume.port", "filer.port")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        str(Path(sys.executable).with_name("weed")),
        *("mini", f"-dir={folder}", "-ip=127.0.0.1", f"-bucket={BUCKET}"),
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    process = subprocess.Popen(
        command,
        env={"HOME": str(folder), **KEYS},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        _wait_until_ready(process, url)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3_environment(
    s3_url: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """This process's environment set up for the server, with a prefix and a cache of its own."""
    own = {
        **KEYS,
        "TITA_S3_ENDPOINT_URL": s3_url,
        "TITA_S3_REGION": "us-east-1",
        "TITA_S3_PATH_STYLE": "true",
        "TITA_STORE": f"s3://{BUCKET}/{abs(hash((request.node.nodeid, time.time())))}",
        "TITA_CACHE_DIR": str(tmp_path / "cache"),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return {**os.environ, **own}
