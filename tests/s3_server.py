"""S3 servers for the tests: SeaweedFS, which verifies signatures and digests, and moto.

A pytest plugin, registered in `conftest.py`. Fixtures: `s3_environment` for SeaweedFS and
`moto_environment` for moto.
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

from tita.gang import free_port

BUCKET = "tests"
_GRPC_OFFSET = 10_000
KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}


class S3Server(NamedTuple):
    """A running SeaweedFS and its endpoint."""

    process: "subprocess.Popen[bytes]"
    url: str

    def client(self, **keys: str) -> Any:
        """See `client`."""
        return client(self.url, **keys)

    def wait_until_ready(self, bucket: str) -> None:
        """Wait until it accepts objects."""
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        for _ in range(600):
            try:
                client.put_object(Bucket=bucket, Key="ready", Body=b"")
            except (BotoCoreError, ClientError):
                code = self.process.poll()
                assert code is None, f"the S3 server ended with {code}"
                time.sleep(0.1)
            else:
                return
        self.process.kill()
        raise AssertionError("the S3 server is not ready after 60 s")


def client(url: str, **keys: str) -> Any:
    """A client without retries; `keys` replace the valid ones."""
    import boto3
    from botocore.config import Config

    keys = {**KEYS, **keys}
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )


def start(folder: Path, *arguments: str, bucket: str) -> S3Server:
    """Run `weed mini` with these arguments and free ports, and wait until it accepts objects."""
    options = free_ports("s3.port", "s3.port.grpc", "master.port", "volume.port", "filer.port")
    ports = [f"-{name}={port}" for name, port in options.items()]
    process = run_weed(folder, "mini", *arguments, *ports, **KEYS)
    server = S3Server(process, f"http://127.0.0.1:{options['s3.port']}")
    server.wait_until_ready(bucket)
    return server


def run_weed(folder: Path, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Run SeaweedFS in `folder`."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("weed"), *arguments],
        env={"HOME": str(folder), **environment},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def free_ports(*names: str) -> dict[str, int]:
    """A different free port for each name; SeaweedFS also uses the one 10,000 above, for gRPC."""
    ports: set[int] = set()
    while len(ports) < len(names):
        port = free_port()
        if _is_free(port + _GRPC_OFFSET):
            ports.add(port)
    return dict(zip(names, ports, strict=True))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """The endpoint of a new server that stores its files in `folder`."""
    server = start(
        folder,
        *(f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"),
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        "-master.telemetry=false",
        bucket=BUCKET,
    )
    try:
        yield server.url
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of the S3 server that all tests of this session share."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """The endpoint of moto's S3 server, which runs in this process."""
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
    """An environment for the S3 server, with a new prefix and cache; also set in this process."""
    return _environment(s3_url, tmp_path, request, monkeypatch)


@pytest.fixture
def moto_environment(
    moto_url: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Like `s3_environment`, for moto."""
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
