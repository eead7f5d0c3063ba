"""One incident is one try, whatever number of nodes it takes down; store, watch and Job agree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tita.cli.main import tita
from tita.errors import IGNORED, ExitCode, OutOfTries
from tita.gang.attempts import AttemptRecord, NodeAttempt, boot_id, node_ends, read_attempts
from tita.gang.incidents import count_tries
from tita.launch.objects import INDEX
from tita.launch.outcome import failure_reason, run_outcome
from tita.launch.reasons import retry_reason
from tita.launch.scope import CommandScope
from tita.launch.tries import incidents_of
from tita.storage import Store, open_store

TRIES = 3
KILLED, LOST, DRAINED = "killed", "lost", "drained"
LOST_PEER, ABORTED = int(ExitCode.LOST_PEER), 134
Outcome = int | str
"""How one node ends: its exit code, or one of the words above."""


class Cluster:
    """Nodes that fail as told. Their pods are as in Kubernetes, their record is in a real store.

    The Job counts failed pods as the Job controller does with the chart's podFailurePolicy.
    """

    def __init__(self, store: Store, nodes: int) -> None:
        self.store, self.nodes = store, nodes
        self.pods: list[dict[str, Any]] = []
        self.now = time.time() - 100_000
        self.failed = 0

    @property
    def backoff_limit(self) -> int:
        return TRIES * self.nodes

    def attempt(self, *outcomes: Outcome) -> None:
        """All nodes start, run for a while, and end within 12 s of the first."""
        assert len(outcomes) == self.nodes
        order = sorted(range(self.nodes), key=lambda node: outcomes[node] == LOST_PEER)
        ended = {node: self.now + 60 + 12 * rank / self.nodes for rank, node in enumerate(order)}
        for node, outcome in enumerate(outcomes):
            self._end(node, outcome, started=self.now + node, ended=ended[node])
        # The Job controller waits before it replaces the pods.
        self.now += 60 + 12 + 20

    def _end(self, node: int, outcome: Outcome, *, started: float, ended: float) -> None:
        own = NodeAttempt(
            node=node,
            started_ms=int(started * 1000),
            boot=f"other{len(self.pods)}" if outcome == LOST else boot_id(),
        )
        self._put(own.name)
        code = {KILLED: 137, LOST: 137, DRAINED: 143}.get(str(outcome), outcome)
        if outcome not in (KILLED, LOST):
            end = NodeAttempt(
                node=node,
                started_ms=own.started_ms,
                boot=own.boot,
                ended_ms=int(ended * 1000),
                code=int(code),
            )
            self._put(end.name)
        reason = "ContainerStatusUnknown" if outcome == LOST else "Error"
        state = {"exitCode": code, "reason": reason, "finishedAt": stamp(ended)}
        disrupted = [{"type": "DisruptionTarget", "status": "True", "reason": "Drain"}]
        self.pods.append(
            {
                "metadata": {
                    "name": f"r-{node}-{len(self.pods)}",
                    "annotations": {INDEX: str(node)},
                    "creationTimestamp": stamp(started),
                },
                "spec": {},
                "status": {
                    "phase": "Failed",
                    "conditions": disrupted if outcome == DRAINED else [],
                    "containerStatuses": [{"name": "tita", "state": {"terminated": state}}],
                },
            }
        )
        if outcome != DRAINED and code not in IGNORED:
            self.failed += 1

    def _put(self, name: str) -> None:
        self.store.put(f"attempts/r/uid/{name}", b"")

    @property
    def job(self) -> dict[str, Any]:
        container = {"name": "tita", "env": [{"name": "TITA_TRIES", "value": str(TRIES)}]}
        spec = {"backoffLimit": self.backoff_limit, "parallelism": self.nodes}
        return {
            "metadata": {"name": "r"},
            "spec": spec | {"template": {"spec": {"containers": [container]}}},
            "status": {"failed": self.failed},
        }

    def start(self) -> list[AttemptRecord]:
        """All nodes start again."""
        records = [
            AttemptRecord(self.store, run="r", launch="uid", node=node, tries=TRIES)
            for node in range(self.nodes)
        ]
        for record in records:
            record.start()
        return records


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def all_killed(nodes: int) -> list[Outcome]:
    return [KILLED] * nodes


def all_aborted(nodes: int) -> list[Outcome]:
    return [ABORTED] * nodes


def one_fails(nodes: int, node: int) -> list[Outcome]:
    return [1 if node % nodes == n else LOST_PEER for n in range(nodes)]


def one_lost(nodes: int, node: int = 0) -> list[Outcome]:
    return [LOST if node % nodes == n else ABORTED for n in range(nodes)]


def one_drained(nodes: int) -> list[Outcome]:
    return [DRAINED, *([LOST_PEER] * (nodes - 1))]


def store_unavailable(nodes: int) -> list[Outcome]:
    return [75] * nodes


SCENARIOS: dict[str, Any] = {
    "all at once": (3, lambda n: [all_killed(n)] * 3),
    "all abort": (3, lambda n: [all_aborted(n)] * 3),
    "one after another": (3, lambda n: [one_fails(n, node) for node in range(3)]),
    "mixture": (
        3,
        lambda n: [
            *(one_lost(n), all_killed(n), one_drained(n), one_fails(n, 1), store_unavailable(n)),
            *(one_lost(n, 1), all_aborted(n), one_lost(n)),
        ],
    ),
    "nodes are lost": (0, lambda n: [one_lost(n, node) for node in range(6)]),
}


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_store_watch_and_job_agree(tmp_path: Path, scenario: str, nodes: int) -> None:
    used, attempts = SCENARIOS[scenario]
    cluster = Cluster(open_store(str(tmp_path)), nodes)
    for outcomes in attempts(nodes):
        cluster.attempt(*outcomes)
    # The run survives: every node may start, and the Job has not failed.
    records = cluster.start()
    if nodes > 1 or scenario not in ("mixture", "nodes are lost"):  # one node has no peers
        assert cluster.failed <= cluster.backoff_limit
    assert count_tries(node_ends(read_attempts(cluster.store, "r"))) == used
    assert sum(incident.is_try for incident in incidents_of(cluster.pods)) == used
    told = retry_reason(cluster.job, cluster.pods)
    assert told is not None
    assert (f"{used} of 3 tries used" if used else "(not counted)") in told.text
    if used < TRIES:
        return
    # One more incident ends it: where a node fails, at once; where it is killed, at its next start.
    if nodes > 1:
        assert records[0].end(LOST_PEER) == LOST_PEER
    assert records[-1].end(1) == ExitCode.OUT_OF_TRIES
    with pytest.raises(OutOfTries, match="no tries are left: 4 incidents, 3 allowed"):
        cluster.start()


def test_an_abort_is_decided_when_all_nodes_have_ended(tmp_path: Path) -> None:
    """Whether it is a try depends on whether another node was lost."""
    cluster = Cluster(open_store(str(tmp_path)), 2)
    for _ in range(TRIES):
        cluster.attempt(*all_killed(2))
    first, second = cluster.start()
    assert first.end(ABORTED) == ABORTED
    assert second.end(ABORTED) == ABORTED
    with pytest.raises(OutOfTries):
        cluster.start()


def test_another_launch_of_the_run_has_its_own_tries(tmp_path: Path) -> None:
    cluster = Cluster(open_store(str(tmp_path)), 1)
    for _ in range(TRIES + 1):
        cluster.attempt(KILLED)
    AttemptRecord(cluster.store, run="r", launch="other", node=0, tries=TRIES).start()
    assert count_tries(node_ends(read_attempts(cluster.store, "r"))) == 0


def test_the_verdict_names_the_tries(tmp_path: Path) -> None:
    cluster = Cluster(open_store(str(tmp_path)), 2)
    for _ in range(TRIES):
        cluster.attempt(*all_killed(2))
    cluster.attempt(LOST_PEER, int(ExitCode.OUT_OF_TRIES))
    message = "Container tita for pod default/r-1-x failed with exit code 13 matching FailJob rule"
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": message}
    job = cluster.job | {"status": {"failed": 6, "conditions": [failed]}}
    job["metadata"] = {"name": "r", "labels": {}}
    assert failure_reason(job) == "no tries are left"
    outcome = run_outcome(job, cluster.pods, run="r", scope=CommandScope())
    assert outcome.exit_code == ExitCode.OUT_OF_TRIES
    assert outcome.lines[0] == "r failed: no tries are left"
    assert "ended with exit code 13: no tries are left" in outcome.lines[1]
    assert "ended with exit code 137: killed" in outcome.lines[2]
    assert outcome.lines[-1] == "4 incidents; a run survives 3 incidents"


def test_runs_show_counts_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(open_store(str(tmp_path)), 4)
    for outcomes in (all_killed(4), one_lost(4), one_fails(4, 2)):
        cluster.attempt(*outcomes)
    cluster.start()
    cluster.store.put("runs/r/run.json", b"{}")
    with pytest.raises(SystemExit):
        tita(["runs", "show", "r", "--store", str(tmp_path), "-o", "json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["incidents"], shown["tries_used"]) == (3, 2)
    with pytest.raises(SystemExit):
        tita(["runs", "show", "r", "--store", str(tmp_path)])
    assert "3 incidents, 2 of them counted as tries" in capsys.readouterr().err


NODE = """
import os, signal, sys
from tita.errors import TitaError
from tita.gang.attempts import AttemptRecord
from tita.settings import settings
from tita.storage import open_store
attempts = AttemptRecord.from_settings(settings(), open_store())
try:
    attempts.start()
except TitaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
how = sys.argv[1]
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(attempts.end(int(how)))
"""


@pytest.mark.slow
def test_real_processes_run_out_of_tries(s3_environment: dict[str, str]) -> None:
    own = {"TITA_RUN": "r", "TITA_LAUNCH_UID": "uid", "TITA_TRIES": "1"}

    def node(how: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", NODE, how],
            env={**os.environ, **s3_environment, **own},
            capture_output=True,
            text=True,
            check=False,
        )

    assert node("75").returncode == 75
    assert node("kill").returncode == -signal.SIGKILL
    again = node("75")
    assert again.returncode == 75
    assert "start after 2 incidents; 1 of 1 tries used" in again.stderr
    last = node("1")
    assert last.returncode == ExitCode.OUT_OF_TRIES
    assert "no tries are left: 2 incidents, 1 allowed" in last.stderr
    refused = node("0")
    assert refused.returncode == ExitCode.OUT_OF_TRIES
    assert "no tries are left" in refused.stderr
