"""A fake cluster with the chart's templates, and a display that records everything."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import Configuration

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from fake_api import FakeApi  # noqa: E402

from tita.launch.cluster import Cluster, RetryPolicy  # noqa: E402
from tita.launch.follow import Follower  # noqa: E402
from tita.launch.kubeconfig import ClusterAccess, open_client  # noqa: E402
from tita.launch.outcome import RunOutcome  # noqa: E402
from tita.launch.run_state import RunSnapshot  # noqa: E402
from tita.launch.submit import LaunchRequest, find_template, plan, submit  # noqa: E402


@dataclass
class Recorder:
    """A display that records everything."""

    snapshots: list[RunSnapshot] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)

    def update(self, snapshot: RunSnapshot) -> None:
        self.snapshots.append(snapshot)

    def say(self, text: str) -> None:
        self.said.append(text)

    def line(self, source: str, text: str) -> None:
        self.lines.append((source, text))

    def close(self) -> None:
        return

    @property
    def text(self) -> str:
        return "\n".join(self.said)

    @property
    def phases(self) -> list[str]:
        """The phases in order, each once while it lasts."""
        found: list[str] = []
        for snapshot in self.snapshots:
            if not found or found[-1] != snapshot.phase:
                found.append(str(snapshot.phase))
        return found


def until(true: Callable[[], Any], *, timeout_s: float = 60.0) -> None:
    """Wait until another thread makes `true` return true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@dataclass
class Lab:
    """A fake cluster, its client, and a watch of a run."""

    api: FakeApi
    cluster: Cluster
    folder: Path
    view: Recorder = field(default_factory=Recorder)
    until: Callable[..., None] = until
    _done: list[RunOutcome | BaseException] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def submit(
        self, run: str = "r", *, job: str = "train-dpo", gpus: int | None = None, **more: Any
    ) -> None:
        """Launch a run as the command does."""
        template = find_template(self.cluster, job)
        manifest, _ = plan(LaunchRequest(job=job, run=run, recipe={}, gpus=gpus, **more), template)
        submit(self.cluster, manifest)

    def watch(self, run: str = "r", *, all_ranks: bool = False) -> Recorder:
        """Watch it in the background."""
        follower = Follower(self.cluster, run, self.view, all_ranks=all_ranks, queue_every_s=0.2)

        def follow() -> None:
            try:
                outcome = follower.watch()
                follower.explain(outcome)
                self._done.append(outcome)
            except BaseException as error:
                self._done.append(error)

        self._thread = threading.Thread(target=follow, daemon=True)
        self._thread.start()
        return self.view

    def running(self, *, nodes: int = 1) -> list[str]:
        """The running pods of a run that is being watched."""
        self.submit(gpus=4 * nodes)
        pods = [self.api.pod("r", index, node=f"node-{index + 1}") for index in range(nodes)]
        view = self.watch()
        self.until(lambda: view.phases[-1:] == ["running"])
        return pods

    def outcome(self) -> RunOutcome:
        """The outcome of the watch."""
        assert self._thread is not None
        self._thread.join(timeout=100)
        assert self._done, f"the watch goes on: {self.view.said}"
        result = self._done[0]
        if isinstance(result, BaseException):
            raise result
        return result

    def cli(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run `tita` against this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "tita", *arguments],
            capture_output=True, text=True, timeout=60, env=self.environment(), **more,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """An environment whose kubeconfig has only this cluster."""
        config = self.folder / "kubeconfig"
        context = {"cluster": "fake", "user": "ada", "namespace": "lab"}
        config.write_text(
            yaml.safe_dump(
                {
                    "current-context": "fake",
                    "clusters": [{"name": "fake", "cluster": {"server": self.api.url}}],
                    "users": [{"name": "ada", "user": {"token": "t0ken"}}],
                    "contexts": [{"name": "fake", "context": context}],
                }
            )
        )
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TITA_", "AWS_"))}
        return clean | {"KUBECONFIG": str(config), "COLUMNS": "80"}


@cache
def helm_dir(major: str) -> Path:
    """The folder with helm of this major version, and kubectl."""
    found = subprocess.run(
        [sys.executable, str(ROOT / "charts" / "get_helm.py"), major],
        stdout=subprocess.PIPE, text=True, check=True, timeout=600,
    )  # fmt: skip
    return Path(found.stdout.strip())


@pytest.fixture(scope="session")
def helm() -> Path:
    """helm 4."""
    return helm_dir("4") / "helm"


@pytest.fixture(scope="session")
def rendered(helm: Path) -> list[dict[str, Any]]:
    """The rendered chart, with four GPUs per node."""
    chart = ROOT / "charts" / "tita"
    done = subprocess.run(
        [
            helm, "template", "tita", str(chart),
            "--namespace", "lab", "--kube-version", "1.36",
            "--values", str(chart / "ci" / "default-values.yaml"),
            "--set", "jobs.perJob.train-dpo.gpusPerNode=4",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, timeout=60,
    )  # fmt: skip
    return [item for item in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if item]


@pytest.fixture
def api(rendered: list[dict[str, Any]]) -> Iterator[FakeApi]:
    """A cluster with the release `tita` in namespace `lab` and two nodes of four GPUs."""
    server = FakeApi().start()
    for item in rendered:
        if item["kind"] == "CronJob":
            server.put("cronjobs.batch", item)
    server.put("serviceaccounts", {"metadata": {"name": "tita"}})
    for name in ("node-1", "node-2"):
        allocatable = {"cpu": "64", "nvidia.com/gpu": "4"}
        node = {"metadata": {"name": name}, "spec": {}, "status": {"allocatable": allocatable}}
        server.put("nodes", node)
    yield server
    if server.alive:
        server.stop()


@pytest.fixture
def lab(api: FakeApi, tmp_path: Path) -> Lab:
    """The cluster, and a client with short timeouts."""
    client = open_client(Configuration(host=api.url))
    access = ClusterAccess(client=client, namespace="lab")
    retry = RetryPolicy(attempts=3, first_wait_s=0.05, timeout_s=5.0)
    return Lab(api=api, cluster=Cluster(access, retry=retry), folder=tmp_path)
