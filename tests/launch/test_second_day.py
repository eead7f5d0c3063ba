"""A drill over two namespaces with namesakes, from the first install to the second.

helm acts on the API server of `tests/chart`, which has no controllers; `sync` copies the objects
to the one of this folder, where `tita` acts and the test plays controllers and kubelets. The
store is a real S3 server.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chart.api.server import ApiServer, key_of
from tita.errors import ExitCode
from tita.launch.cluster import Cluster, RetryPolicy
from tita.launch.doctor import run_doctor
from tita.launch.kubeconfig import ClusterAccess
from tita.storage import open_store
from tita.storage.locate import read_pointer

CHART = Path(__file__).parents[2] / "charts" / "tita"
BOTH = ("lab", "tita2")
POD_OF = "test/pod-of"
"""Label of pods that the test creates for a workload."""
SYNCED = {
    "cronjobs": "cronjobs.batch",
    "deployments": "deployments.apps",
    "statefulsets": "statefulsets.apps",
    "persistentvolumeclaims": "persistentvolumeclaims",
    "secrets": "secrets",
    "serviceaccounts": "serviceaccounts",
}
"""Plurals of what helm installs and `tita` reads, and their names in the other server."""


@dataclass
class Drill:
    """The cluster, as helm and as `tita` see it."""

    lab: Any
    helm_api: ApiServer
    helm: Path
    bucket: str
    root: str
    """Prefix of this test in the bucket."""
    environment: dict[str, str]

    def run_helm(self, verb: str, namespace: str, *flags: str) -> str:
        """Run helm on the release `tita` of a namespace, and let `tita` see the result."""
        kubeconfig = self.lab.folder / "helm-kubeconfig"
        kubeconfig.write_text(self.helm_api.kubeconfig())
        chart = [] if verb == "uninstall" else [
            str(CHART), "--disable-openapi-validation",
            f"--values={CHART / 'ci' / 'trial-values.yaml'}", "--set=rbac.clusterRole=true",
            f"--set=s3.bucket={self.bucket},s3.prefix={self.prefix(namespace)}",
            "--set=jobs.perJob.train-dpo.gpusPerNode=4",
        ]  # fmt: skip
        done = subprocess.run(
            [self.helm, verb, "tita", *chart, "--namespace", namespace, *flags],
            env={"KUBECONFIG": str(kubeconfig), "HOME": str(self.lab.folder), "PATH": "/usr/bin"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.sync()
        return done.stdout

    def prefix(self, namespace: str) -> str:
        return f"{self.root}/{namespace}"

    def store(self, namespace: str) -> Any:
        return open_store(f"s3://{self.bucket}/{self.prefix(namespace)}")

    def sync(self) -> None:
        """Copy what helm changed; pods and their status are not helm's."""
        kept = set()
        for (plural, _), item in list(self.helm_api.objects.items()):
            if plural in SYNCED and not item["metadata"]["name"].startswith("sh.helm."):
                metadata = item["metadata"]
                key = (SYNCED[plural], metadata["namespace"], metadata["name"])
                status = self.lab.api.objects.get(key, {}).get("status")
                self.lab.api.put(key[0], item | ({"status": status} if status else {}))
                kept.add(key)
        for key in set(self.lab.api.objects) - kept:
            if key[0] in SYNCED.values():
                del self.lab.api.objects[key]

    def start_pods(self, namespace: str, **status: Any) -> None:
        """Give each StatefulSet and Deployment one ready pod, and bind the claims."""
        objects = self.lab.api.objects
        for key, item in list(objects.items()):
            if key[:2] == ("pods", namespace) and POD_OF in item["metadata"]["labels"]:
                del objects[key]
        for (resource, where, name), item in list(objects.items()):
            if where != namespace:
                continue
            if resource == "persistentvolumeclaims":
                self.lab.api.put(resource, item | {"status": {"phase": "Bound"}})
            if resource in ("statefulsets.apps", "deployments.apps"):
                template = item["spec"]["template"]
                labels = template["metadata"]["labels"] | {POD_OF: name}
                metadata = {"name": f"{name}-0", "namespace": namespace, "labels": labels}
                ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
                pod = {"metadata": metadata, "spec": template["spec"]}
                self.lab.api.put(
                    "pods", pod | {"status": status.get(name.rpartition("-")[2], ready)}
                )

    def doctor(self, namespace: str) -> tuple[bool, str]:
        """Whether `tita doctor -n NAMESPACE` finds no fault, and its lines about the components."""
        access = ClusterAccess(client=self.lab.cluster.access.client, namespace=namespace)
        cluster = Cluster(access, retry=RetryPolicy(attempts=1))
        lines: list[str] = []
        run_doctor(cluster, release=None, report=lambda result: lines.append(str(result)))
        found = [line for line in lines if re.match(r"\S+ +(embedded store|inference):", line)]
        assert len(found) == 2
        return not any(line.startswith("bad") for line in found), "\n".join(found)

    def tita(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "KUBECONFIG": self.lab.environment()["KUBECONFIG"]}
        return subprocess.run(
            [sys.executable, "-m", "tita", *words],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def snapshot(self, namespace: str) -> dict[Any, Any]:
        """What helm and `tita` have in a namespace; `sync` changes resource versions."""
        found = {
            key: json.loads(json.dumps(item))
            for key, item in self.lab.api.objects.items()
            if key[1] == namespace and key[0] != "pods"
        }
        for item in found.values():
            del item["metadata"]["resourceVersion"]
        return found


@pytest.fixture
def drill(lab: Any, helm: Path, s3_environment: dict[str, str]) -> Iterator[Drill]:
    helm_api = ApiServer()
    lab.api.objects = {k: v for k, v in lab.api.objects.items() if k[0] == "nodes"}
    _, _, bucket, root = s3_environment["TITA_STORE"].split("/")
    yield Drill(lab, helm_api, helm, bucket, root, s3_environment)
    helm_api.shutdown()
    helm_api.server_close()


def put_run(drill: Drill, namespace: str, words: str) -> None:
    """A complete run `r` in the store of a namespace."""
    folder = drill.lab.folder / namespace
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps({"about": words}))
    drill.store(namespace).push_tree(folder, "runs/r", meta={"job": "train-dpo", "run": "r"})


def launch_namesakes(drill: Drill) -> None:
    """Run `r` in both namespaces, at work in one and failed in the other."""
    for namespace in BOTH:
        words = (
            "launch",
            "train-dpo",
            "--gpus",
            "4",
            "--name",
            "r",
            "--set",
            "beta=0.25",
            "--detach",
        )
        done = drill.tita(*words, "-n", namespace)
        assert done.returncode == 0, done.stderr
    drill.lab.api.pod("r", node="node-1", suffix="good", namespace="lab")
    failed = drill.lab.api.pod("r", node="node-1", suffix="bad", namespace="tita2")
    drill.lab.api.end_pod(failed, 1)
    drill.lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded", namespace="tita2")


def copy_objects(drill: Drill, source: str, destination: str) -> int:
    """What `aws s3 sync` does, twice: the objects of one prefix under another."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3", endpoint_url=drill.environment["TITA_S3_ENDPOINT_URL"], region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )  # fmt: skip
    listed = client.list_objects_v2(Bucket=drill.bucket, Prefix=f"{source}/")["Contents"]
    for key in (entry["Key"] for entry in listed):
        body = client.get_object(Bucket=drill.bucket, Key=key)["Body"].read()
        name = destination + key.removeprefix(source)
        client.put_object(Bucket=drill.bucket, Key=name, Body=body)
    return len(listed)


def test_the_second_day(drill: Drill) -> None:
    api, other = drill.lab.api, "tita2"

    # Install. Without pods, doctor says what is missing and does not call it "not part".
    for namespace in BOTH:
        drill.run_helm("install", namespace)
    roles = [name for plural, name in drill.helm_api.objects if plural == "clusterroles"]
    assert sorted(roles) == ["tita:lab:tita:launcher", "tita:tita2:tita:launcher"]
    good, lines = drill.doctor(other)
    assert not good
    assert "StatefulSet tita-s3 has 0 of 1 pod" in lines
    assert "Deployment tita-inference has 0 of 1 pod" in lines
    for namespace in BOTH:
        drill.start_pods(namespace)
        assert drill.doctor(namespace)[0]

    # Run, fail, and follow the remedy: the namesake's run goes on.
    launch_namesakes(drill)
    first = drill.snapshot("lab")
    failed = api.get("jobs.batch", "r", namespace=other)
    told = drill.tita("jobs", "watch", "r", "-n", other).stderr
    (advice,) = re.findall(r"tita jobs delete .*", told)
    for command in advice.split(" && "):
        words = shlex.split(command)[1:]
        done = drill.tita(*words, *(["--detach"] if words[0] == "launch" else []))
        assert done.returncode == 0, (command, done.stderr)
    again = api.get("jobs.batch", "r", namespace=other)
    assert again["metadata"]["uid"] != failed["metadata"]["uid"]
    assert drill.snapshot("lab") == first

    # Upgrade: runs keep their image, and the next one has the new image.
    drill.run_helm("upgrade", other, "--set=image.tag=2.0.0")
    assert api.get("jobs.batch", "r", namespace=other) == again
    template = api.get("cronjobs.batch", "tita-train-dpo", namespace=other)
    assert "tita:2.0.0" in str(template["spec"])

    # Promote in one namespace.
    for namespace in BOTH:
        put_run(drill, namespace, f"trained in {namespace}")
    before = api.get("deployments.apps", "tita-inference", namespace="lab")
    drill.environment["TITA_STORE"] = drill.store(other).uri
    done = drill.tita("promote", "r", "-n", other, "--no-wait", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["restarted"] == "tita-inference"
    assert read_pointer(drill.store(other), "reward/current").target == "runs/r/model"
    assert read_pointer(drill.store("lab"), "reward/current") is None
    assert api.get("deployments.apps", "tita-inference", namespace="lab") == before
    drill.environment["TITA_STORE"] = drill.store("lab").uri
    wrong = drill.tita("promote", "r", "-n", other, "--no-wait")
    assert wrong.returncode == ExitCode.USER, "the other release does not read this store"

    # Failures and their remedies.
    ended = {"exitCode": 2, "reason": "Error", "message": "loading\nbase: not a tree; push it"}
    crash = {"name": "tita", "restartCount": 4, "lastState": {"terminated": ended}}
    crash["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
    drill.start_pods(other, inference={"phase": "Running", "containerStatuses": [crash]})
    good, lines = drill.doctor(other)
    assert not good
    assert "base: not a tree; push it" in lines
    claim = key_of("persistentvolumeclaims", "tita-s3", other)
    uid = drill.helm_api.objects.pop(claim)["metadata"]["uid"]
    drill.sync()
    waiting = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False"}]}
    drill.start_pods(other, s3=waiting)
    good, lines = drill.doctor(other)
    assert not good
    assert "there is no claim 'tita-s3'; run the last `helm upgrade` again" in lines
    drill.run_helm("upgrade", other, "--set=image.tag=2.0.0")
    assert drill.helm_api.objects[claim]["metadata"]["uid"] != uid
    drill.start_pods(other)
    assert drill.doctor(other)[0]

    # Rename: the claim stays in use, and runs go on.
    uid = drill.helm_api.objects[claim]["metadata"]["uid"]
    drill.run_helm("upgrade", other, "--set=image.tag=2.0.0,fullnameOverride=vlm")
    assert drill.helm_api.objects[claim]["metadata"]["uid"] == uid
    renamed = api.get("statefulsets.apps", "vlm-s3", namespace=other)
    assert "'claimName': 'tita-s3'" in str(renamed)
    assert api.get("jobs.batch", "r", namespace=other) == again
    drill.start_pods(other)
    assert drill.doctor(other)[0]
    done = drill.tita("launch", "train-dpo", "--name", "r2", "--gpus", "4", "--detach", "-n", other)
    assert done.returncode == 0, done.stderr

    # Move to a real bucket.
    assert copy_objects(drill, drill.prefix(other), f"{drill.prefix(other)}-moved") >= 3
    moved = (
        f"--set=s3.embedded.enabled=false,s3.prefix={drill.prefix(other)}-moved,"
        f"s3.endpoint={drill.environment['TITA_S3_ENDPOINT_URL']},s3.existingSecret=keys"
    )
    drill.run_helm("upgrade", other, "--set=image.tag=2.0.0,fullnameOverride=vlm", moved)
    assert claim in drill.helm_api.objects
    reads = str(api.get("deployments.apps", "vlm-inference", namespace=other))
    assert f"s3://{drill.bucket}/{drill.prefix(other)}-moved" in reads
    new = open_store(f"s3://{drill.bucket}/{drill.prefix(other)}-moved")
    assert read_pointer(new, "reward/current").target == "runs/r/model"
    copy = drill.lab.folder / "copy"
    new.pull_tree("runs/r", into=copy)
    assert "trained in tita2" in (copy / "model" / "config.json").read_text()

    # Remove and install again: runs and the claim are still there, and the claim is used.
    drill.run_helm("uninstall", other)
    assert api.get("jobs.batch", "r", namespace=other) == again
    drill.run_helm("install", other)
    assert drill.helm_api.objects[claim]["metadata"]["uid"] == uid
    drill.start_pods(other)
    assert drill.doctor(other)[0]
    assert drill.snapshot("lab") == first
