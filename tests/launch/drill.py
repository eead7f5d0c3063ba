"""A cluster for drills: helm, kubectl and `tita` act on one release in each of two namespaces.

helm and kubectl act on the API server of `tests/chart`, which has no controllers; `sync` copies its
objects to the one of this folder, where `tita` acts and the test plays controllers and kubelets.
The store is a real S3 server.
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.chart.api.server import ApiServer
from tita.cli.commands import app
from tita.cli.main import run
from tita.launch.cluster import Cluster, RetryPolicy
from tita.launch.doctor import run_doctor
from tita.launch.kubeconfig import ClusterAccess
from tita.launch.scope import CommandScope
from tita.settings import settings
from tita.storage import open_store
from tita.storage.locate import read_pointer

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "tita"
NAMESAKE, OTHER = "lab", "tita2"
"""The context's namespace, and the one that is given by `-n`."""
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
READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
_ADVICE = re.compile(
    r"`((?:tita|kubectl|helm) [^`]+)`|(?:: |, or )((?:tita|kubectl|helm) [a-z-].*)$", re.MULTILINE
)


def advice(text: str) -> list[str]:
    """The commands that a message recommends, as a user would copy them."""
    return [quoted or plain for quoted, plain in _ADVICE.findall(text)]


@dataclass
class Drill:
    """The cluster, as helm, kubectl and `tita` see it."""

    lab: Any
    helm_api: ApiServer
    tools: Path
    """The folder with helm and kubectl."""
    bucket: str
    root: str
    """Prefix of this test in the bucket."""
    environment: dict[str, str]

    def __post_init__(self) -> None:
        self.programs = self.lab.folder / "programs"
        self.programs.mkdir()
        kubeconfig = self.lab.folder / "helm-kubeconfig"
        kubeconfig.write_text(self.helm_api.kubeconfig())
        environment = f"KUBECONFIG={kubeconfig} HOME={self.lab.folder}"
        # The API server has no OpenAPI documents, with which helm would validate objects.
        option = "for a; do case $a in install|upgrade) o=--disable-openapi-validation;; esac; done"
        self.write_program("helm", f'{option}\n{environment} exec {self.tools}/helm "$@" $o')
        self.write_program("kubectl", f'{environment} exec {self.tools}/kubectl "$@"')
        self.python = sys.executable
        self.write_program("tita", f'exec {self.python} -m tita "$@"')
        self.environment |= {
            "KUBECONFIG": self.lab.environment()["KUBECONFIG"],
            "PATH": f"{self.programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "200",
        }  # fmt: skip

    def write_program(self, program: str, script: str) -> None:
        path = self.programs / program
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    def tita(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `tita` in this process, which is quicker than `follow`."""
        out, errors = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment, clear=True),
            redirect_stdout(out),
            redirect_stderr(errors),
        ):
            settings.cache_clear()
            code = run(app, words, name="tita")
        settings.cache_clear()
        return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())

    def helm(self, verb: str, namespace: str, *flags: str) -> str:
        """Run helm on the release `tita` of a namespace, and let `tita` see the result."""
        chart = [] if verb == "uninstall" else [
            str(CHART), f"--values={CHART / 'ci' / 'trial-values.yaml'}",
            "--set=rbac.clusterRole=true,jobs.perJob.train-dpo.gpusPerNode=4",
            f"--set=s3.bucket={self.bucket},s3.prefix={self.prefix(namespace)}",
        ]  # fmt: skip
        done = self._run("helm", verb, "tita", *chart, "--namespace", namespace, *flags)
        assert done.returncode == 0, done.stderr
        self.sync()
        return done.stdout

    def follow(self, command: str, *, code: int | None = 0) -> str:
        """Run a command as a user who copies it into a shell; None: any exit code."""
        done = self._run("sh", "-c", command)
        assert code in (None, done.returncode), (command, done.stdout, done.stderr)
        if re.search(r"\b(helm|kubectl)\b", command):
            self.sync()
        return done.stdout

    def prefix(self, namespace: str) -> str:
        return f"{self.root}/{namespace}"

    def store(self, namespace: str) -> Any:
        return open_store(f"s3://{self.bucket}/{self.prefix(namespace)}")

    def promoted(self, namespace: str) -> str | None:
        pointer = read_pointer(self.store(namespace), "reward/current")
        return pointer.target if pointer else None

    def put_run(self, namespace: str, run: str, *, beta: float) -> None:
        """A complete run in the store of a namespace."""
        folder = self.lab.folder / namespace / run
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "config.json").write_text(json.dumps({"about": namespace}))
        (folder / "recipe.json").write_text(json.dumps({"beta": beta}))
        meta = {"job": "train-dpo", "run": run, "recipe": {"beta": beta}}
        self.store(namespace).push_tree(folder, f"runs/{run}", meta=meta)

    def sync(self) -> None:
        """Copy what helm and kubectl changed; pods and the status of objects are not theirs."""
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
        """Give each StatefulSet and Deployment one pod, ready by default, and bind the claims."""
        objects = self.lab.api.objects
        self.end_pods(namespace)
        for (resource, where, name), item in list(objects.items()):
            if where != namespace:
                continue
            if resource == "persistentvolumeclaims" and "status" not in item:
                self.lab.api.put(resource, item | {"status": {"phase": "Bound"}})
            if resource in ("statefulsets.apps", "deployments.apps"):
                template = item["spec"]["template"]
                labels = template["metadata"]["labels"] | {POD_OF: name}
                metadata = {"name": f"{name}-0", "namespace": namespace, "labels": labels}
                found = status.get(name.rpartition("-")[2], READY)
                pod = {"metadata": metadata, "spec": template["spec"], "status": found}
                self.lab.api.put("pods", pod)

    def end_pods(self, namespace: str) -> None:
        objects = self.lab.api.objects
        for key, item in list(objects.items()):
            if key[:2] == ("pods", namespace) and POD_OF in item["metadata"]["labels"]:
                del objects[key]

    def doctor(self, namespace: str) -> tuple[bool, str]:
        """Whether `tita doctor -n NAMESPACE` finds no fault, and its lines about the components."""
        access = ClusterAccess(client=self.lab.cluster.access.client, namespace=namespace)
        scope = CommandScope(namespace=namespace)
        cluster = Cluster(access, retry=RetryPolicy(attempts=1), scope=scope)
        lines: list[str] = []
        run_doctor(cluster, release=None, report=lambda result: lines.append(str(result)))
        found = [line for line in lines if re.match(r"\S+ +(embedded store|inference):", line)]
        assert len(found) == 2
        return not any(line.startswith("bad") for line in found), "\n".join(found)

    def snapshot(self, namespace: str) -> dict[Any, Any]:
        """What helm and `tita` have in a namespace; `sync` changes resource versions."""
        found = {
            key: json.loads(json.dumps(item))
            for key, item in self.lab.api.objects.items()
            if key[1] == namespace
        }
        for item in found.values():
            del item["metadata"]["resourceVersion"]
        return found | {"promoted": self.promoted(namespace)}

    @contextmanager
    def namesake_untouched(self) -> Iterator[None]:
        before = self.snapshot(NAMESAKE)
        yield
        assert self.snapshot(NAMESAKE) == before
