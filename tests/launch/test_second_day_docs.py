"""The commands of "The second day" in docs/operations.md, copied into a shell, line by line."""

import base64
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.chart.api.server import ApiServer
from tests.launch.conftest import helm_dir
from tests.launch.drill import NAMESAKE, ROOT, Drill
from tests.s3_server import KEYS, client
from tita.launch.promotion import promote
from tita.storage import open_store

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
README = (ROOT / "charts" / "tita" / "README.md").read_text()
NOT_RUN = {
    "kubectl port-forward svc/tita-s3 8333 &": "the store of the test is reachable",
    "helm test tita": "needs a kubelet; tests/chart/test_release.py runs its pod",
}
SYNC = """
import argparse, boto3, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("service", "command", "source", "destination"):
    parser.add_argument(name)
parser.add_argument("--endpoint-url", default=os.environ["REAL_S3"])
given = parser.parse_args()
assert (given.service, given.command) == ("s3", "sync")
s3 = boto3.client("s3", endpoint_url=given.endpoint_url, region_name="us-east-1")
if given.source.startswith("s3://"):
    bucket, _, prefix = given.source.removeprefix("s3://").partition("/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
    for key in (entry["Key"] for page in pages for entry in page["Contents"]):
        path = pathlib.Path(given.destination, key.removeprefix(prefix).lstrip("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(path))
else:
    bucket, _, prefix = given.destination.removeprefix("s3://").partition("/")
    for path in pathlib.Path(given.source).rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(given.source)}")
"""
"""What `aws s3 sync` does with these arguments. Like it, it copies no metadata of objects."""


def blocks(text: str) -> list[list[str]]:
    """The commands of each shell block."""
    found = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in found]


SECOND_DAY = OPERATIONS.split("\n## The second day\n")[1]


@pytest.fixture
def drill(lab: Any, s3_environment: dict[str, str]) -> Iterator[Drill]:
    """A context whose namespace has no release; the release of this test is in no other one."""
    helm_api = ApiServer()
    lab.api.objects = {k: v for k, v in lab.api.objects.items() if k[0] == "nodes"}
    _, _, bucket, root = s3_environment["TITA_STORE"].split("/")
    made = Drill(lab, helm_api, helm_dir("4"), bucket, root, dict(s3_environment))
    made.write_program("aws", f'exec {made.python} {lab.folder}/sync.py "$@"')
    (lab.folder / "sync.py").write_text(SYNC)
    made.environment["REAL_S3"] = s3_environment["TITA_S3_ENDPOINT_URL"]
    yield made
    helm_api.shutdown()
    helm_api.server_close()


class Shell:
    """Runs the lines of blocks with this test's bucket and server instead of those of the docs."""

    def __init__(self, drill: Drill, folder: Path) -> None:
        self.drill, self.folder = drill, folder
        self.exports: list[str] = []
        self.done: list[str] = []
        embedded = f"{drill.bucket}/{drill.prefix(NAMESAKE)}"
        self.names = {
            r"s3://my-bucket/tita\b": f"s3://{drill.bucket}/{drill.root}/moved",
            r"s3://tita\b": f"s3://{embedded}",
            r"s3\.bucket=my-bucket\b": f"s3.bucket={drill.bucket}",
            r"s3\.prefix=tita\b": f"s3.prefix={drill.root}/moved",
            r"http://127\.0\.0\.1:8333": drill.environment["TITA_S3_ENDPOINT_URL"],
            r"(?<=[ /])backup\b": str(folder / "backup"),
        }

    def run(self, line: str) -> str:
        self.done.append(line)
        if line in NOT_RUN:
            return ""
        command = line
        for pattern, own in self.names.items():
            command = re.sub(pattern, own, command)
        if command.startswith("export "):
            self.exports.append(command)
            return ""
        return self.drill.follow(" && ".join([*self.exports, command]))


def test_the_second_day_of_the_docs(drill: Drill, tmp_path: Path) -> None:
    upgrade, backup, move, rotate, remove = blocks(SECOND_DAY)
    shell, store = Shell(drill, tmp_path), drill.store(NAMESAKE)
    objects = drill.helm_api.objects
    drill.helm("install", NAMESAKE)
    drill.start_pods(NAMESAKE)

    # Upgrade and roll back.
    before = image(drill)
    number = {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    for line in upgrade:
        shell.run(line)
        if line.startswith("helm upgrade"):
            assert image(drill) == "tita:0.2.0"
            made = objects["deployments", "tita-inference"]
            made["status"] = number | {"observedGeneration": made["metadata"]["generation"]}
    assert image(drill) == before

    # Back up, lose everything, restore.
    objects["secrets", "tita-s3"]["data"] = {name: encoded(key) for name, key in KEYS.items()}
    for beta in (0.1, 0.2):
        drill.put_run(NAMESAKE, "r", beta=beta)
    promote(store, "r")
    assert store.find_unused("", older_than=timedelta(0))
    for name in KEYS:
        drill.environment[name] = "only the Secret has the keys"
    for line in backup:
        if line.startswith("aws s3 sync backup"):
            assert (tmp_path / "backup" / "runs" / "r" / "manifest.json").exists()
            empty(drill, drill.prefix(NAMESAKE))
            assert store.read_manifest("runs/r") is None
        shell.run(line)
    assert_complete(store, tmp_path / "restored")
    assert not store.find_unused("", older_than=timedelta(0)), "copies do not record their writer"

    # Rotate the keys of the embedded store.
    old = objects["secrets", "tita-s3"]["data"]
    for line in rotate:
        shell.run(line)
    assert not set(objects["secrets", "tita-s3"]["data"].values()) & set(old.values())
    for workload in (("statefulsets", "tita-s3"), ("deployments", "tita-inference")):
        annotations = objects[workload]["spec"]["template"]["metadata"]["annotations"]
        assert "kubectl.kubernetes.io/restartedAt" in annotations

    # Move to a real bucket, whose keys are in the environment.
    drill.environment |= KEYS
    shell.exports.clear()
    for line in move:
        shell.run(line)
    assert_complete(open_store(f"s3://{drill.bucket}/{drill.root}/moved"), tmp_path / "moved")
    (container,) = pod_of(drill)["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["TITA_STORE"]["value"] == f"s3://{drill.bucket}/{drill.root}/moved"
    secret = objects["secrets", "my-bucket-keys"]["data"]
    for name in KEYS:
        reference = variables[name]["valueFrom"]["secretKeyRef"]
        assert reference["name"] == "my-bucket-keys"
        assert reference["key"] in secret
    assert ("persistentvolumeclaims", "tita-s3") in objects
    assert ("statefulsets", "tita-s3") not in objects

    # Remove.
    for line in remove:
        shell.run(line)
    left = {key for key in objects if not key[1].startswith("sh.helm.")}
    assert left == {("secrets", "my-bucket-keys")}, "a user created it"
    assert shell.done == [*upgrade, *backup, *rotate, *move, *remove]


def test_the_install_of_the_chart_readme(drill: Drill, tmp_path: Path) -> None:
    (install,) = blocks(README)
    shell = Shell(drill, tmp_path)
    shell.names = {}
    for line in install:
        shell.run(line)
    objects = drill.helm_api.objects
    job = objects["cronjobs", "tita-train-dpo"]["spec"]["jobTemplate"]["spec"]["template"]
    keys = [
        entry["valueFrom"]["secretKeyRef"]
        for entry in job["spec"]["containers"][0]["env"]
        if entry["name"] in KEYS
    ]
    assert [key["name"] for key in keys] == ["my-bucket-keys"] * 2
    assert {key["key"] for key in keys} == set(objects["secrets", "my-bucket-keys"]["data"])


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def pod_of(drill: Drill) -> dict[str, Any]:
    """The spec of the pods of inference."""
    deployment = drill.helm_api.objects["deployments", "tita-inference"]
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def image(drill: Drill) -> str:
    found: str = pod_of(drill)["containers"][0]["image"]
    return found


def empty(drill: Drill, prefix: str) -> None:
    s3 = client(drill.environment["TITA_S3_ENDPOINT_URL"])
    for entry in s3.list_objects_v2(Bucket=drill.bucket, Prefix=f"{prefix}/")["Contents"]:
        s3.delete_object(Bucket=drill.bucket, Key=entry["Key"])


def assert_complete(store: Any, folder: Path) -> None:
    """The copy has the run, and the pointer to its model."""
    store.pull_tree("runs/r", into=folder)
    assert json.loads((folder / "model" / "config.json").read_text()) == {"about": NAMESAKE}
    pointer = json.loads(store.get("reward/current"))
    assert pointer["target"] == "runs/r/model"
