"""S3 servers for the tests: SeaweedFS in a wheel, which checks secrets and digests, and moto's.

Registered as a plugin by `conftest.py`; ask for `s3_environment`, or for `moto_environment` where a
second implementation is to keep the same promises.
"""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BUCKET = "tests"
KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}


class S3Server(NamedTuple):
    """A running SeaweedFS and its endpoint."""

    process: "subprocess.Popen[bytes]"
    url: str

    def client(self, **keys: str) -> Any:
        """A client with these keys, or with the right ones; it asks once."""
        import boto3
        from botocore.config import Config

        keys = {**KEYS, **keys}
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, for now."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def start(folder: Path, *arguments: str, bucket: str) -> S3Server:
    """Run `weed mini` with these arguments and free ports, and wait until it takes objects."""
    from botocore.exceptions import BotoCoreError, ClientError

    names = ("s3.port", "s3.port.grpc", "master.port", "volume.port", "filer.port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    weed = str(Path(sys.executable).with_name("weed"))
    process = subprocess.Popen(
        [weed, "mini", *arguments, *(f"-{name}={port}" for name, port in ports.items())],
        env={"HOME": str(folder), **KEYS},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = S3Server(process, f"http://127.0.0.1:{ports['s3.port']}")
    client = server.client()
    for _ in range(600):
        try:
            client.put_object(Bucket=bucket, Key="ready", Body=b"")
        except (BotoCoreError, ClientError):
            assert process.poll() is None, f"the S3 server ended with {process.returncode}"
            time.sleep(0.1)
        else:
            return server
    process.kill()
    raise AssertionError("the S3 server never became ready")


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """The endpoint of a server of its own, whose files lie in `folder`."""
    server = start(
        folder,
        *(f"-dir={folder}", "-ip=127.0.0.1", f"-bucket={BUCKET}"),
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        bucket=BUCKET,
    )
    try:
        yield server.url
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server that all tests of this session share."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """The endpoint of another implementation of S3, over HTTP, in this process."""
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {name.lower(): key for name, key in KEYS.items()}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(
        Bucket=BUCKET
    )
    yield url
    server.stop()


@pytest.fixture
def s3_environment(
    s3_url: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """This process's environment set up for the server, with a prefix and a cache of its own."""
    return _environment(s3_url, tmp_path, request, monkeypatch)


@pytest.fixture
def moto_environment(
    moto_url: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """As `s3_environment`, on the other server."""
    return _environment(moto_url, tmp_path, request, monkeypatch)


def _environment(
    url: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    own = {
        **KEYS,
        "TITA_S3_ENDPOINT_URL": url,
        "TITA_S3_REGION": "us-east-1",
        "TITA_S3_PATH_STYLE": "true",
        "TITA_STORE": f"s3://{BUCKET}/{abs(hash((request.node.nodeid, time.time())))}",
        "TITA_CACHE_DIR": str(tmp_path / "cache"),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return {**os.environ, **own}
