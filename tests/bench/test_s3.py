"""The nightly job against a real S3 server: questions from it, report to it, fetched again."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tita.bench.results import read_results

KEYS = {"AWS_ACCESS_KEY_ID": "benchkey", "AWS_SECRET_ACCESS_KEY": "benchsecret"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SeaweedFS with one bucket, as the environment of a process that uses it."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    folder = tmp_path / "weed"
    folder.mkdir()
    names = ("s3.port", "s3.port.grpc", "master.port", "volume.port", "filer.port")
    ports = {name: free_port() for name in names}
    process = subprocess.Popen(
        [
            Path(sys.executable).with_name("weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1",
            "-bucket=bench", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in ports.items()),
        ],
        env={"HOME": str(folder), **KEYS}, cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{ports['s3.port']}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    for _ in range(300):
        try:
            client.put_object(Bucket="bench", Key="ready", Body=b"")
            break
        except (BotoCoreError, ClientError):
            assert process.poll() is None, f"weed ended with {process.returncode}"
            time.sleep(0.1)
    else:
        process.kill()
        raise AssertionError("the S3 server never became ready")
    yield {
        **os.environ, **KEYS, "TITA_S3_ENDPOINT_URL": url, "TITA_S3_REGION": "us-east-1",
        "TITA_S3_PATH_STYLE": "true", "TITA_STORE": "s3://bench/trial",
        "TITA_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    process.kill()
    process.wait()


def run(*arguments: Any, env: dict[str, str]) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_questions_report_and_results_in_s3(
    s3: dict[str, str], endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    ask_file("say:x; one", "say:y; two", references=["x"], metric="exact").rename(
        folder / "questions.jsonl"
    )
    push = "from pathlib import Path; from tita.storage import open_store; import sys;"
    run("-c", push + "open_store().push_tree(Path(sys.argv[1]), 'data/set')", folder, env=s3)
    recipe = {"base_url": endpoint.base_url, "questions": "data/set", "weights": [0.0, 0.3]}
    run("-m", "tita.bench", env={**s3, "TITA_RECIPE": json.dumps(recipe), "TITA_RUN": "night-1"})
    (entry,) = json.loads(run("-m", "tita", "reports", "list", "-o", "json", env=s3))
    assert [score["score"] for score in entry["scores"]] == [50, 50]
    assert entry["good"] is True
    fetched = tmp_path / "fetched"
    run("-m", "tita", "reports", "fetch", "latest", "--into", fetched, env=s3)
    assert (fetched / "report.html").stat().st_size > 1000
    assert len(list(read_results(fetched / "tita_w0.3.jsonl"))) == 2
    page = run("-m", "tita", "reports", "open", "--no-browser", env=s3).strip()
    assert Path(page).read_bytes() == (fetched / "report.html").read_bytes()
