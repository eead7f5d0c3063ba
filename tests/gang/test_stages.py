"""What ranks do is reported by the first node of a real gang, and merged by name."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from tita.activity import current_stage, enter_stage, stage
from tita.gang import free_port, worker
from tita.gang.stages import merge
from tita.records import RankStage, RunStages, read_stages
from tita.terminal import progress

WORKER = """
import os, time
from tita.activity import enter_stage, stage
from tita.terminal import progress
rank = int(os.environ["RANK"])
# Longer than what a rank may differ without being reported.
if rank == 2:
    with progress("pull", total=90 << 20, unit="bytes") as advance:
        for _ in range(9):
            advance(10 << 20)
            time.sleep(0.6)
else:
    enter_stage("loading the model")
    time.sleep(0.5)
    with stage("waiting for other ranks", is_waiting=True):
        time.sleep(5.5)
enter_stage("training")
time.sleep(2.5)
"""


def run(tmp_path: Path, *, nodes: int) -> list[str]:
    """The output of the nodes, two workers each, as `tita train-dpo` runs them."""
    (tmp_path / "worker_under_test.py").write_text(WORKER)
    code = (
        "import sys; from tita.gang import run_workers; from tita.settings import settings;"
        "sys.exit(run_workers('worker_under_test', settings=settings()))"
    )
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "TITA_NUM_NODES": str(nodes), "TITA_PROCS_PER_NODE": "2",
        "TITA_MASTER_ADDR": "127.0.0.1", "TITA_MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=shared | {"TITA_NODE_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(nodes)
    ]  # fmt: skip
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * nodes, texts
    return texts


def test_the_first_node_reports_what_the_ranks_of_all_nodes_do(tmp_path: Path) -> None:
    first, second = run(tmp_path, nodes=2)
    assert not any(map(read_stages, second.splitlines()))
    assert "pull: " not in second, "the worker's progress is in the record, and not a line of text"
    found = [record for record in map(read_stages, first.splitlines()) if record is not None]
    assert {record.ranks_per_node for record in found} == {2}
    named = [{stage.name: stage for stage in record.stages} for record in found]
    assert list(named[0]) == ["waiting for 1 other node"]
    assert named[0]["waiting for 1 other node"].ranks == (0, 1)
    mixed = [stages for stages in named if "pull" in stages]
    assert mixed, first
    pulls = [stages["pull"] for stages in mixed]
    assert {pull.ranks for pull in pulls} == {(2,)}
    assert {(pull.total, pull.unit) for pull in pulls} == {(90 << 20, "bytes")}
    assert all(0 <= pull.done <= 90 << 20 for pull in pulls)
    # On a busy machine a record may miss a short stage of another rank.
    others = {
        rank for stages in mixed for name in stages if name != "pull" for rank in stages[name].ranks
    }
    assert others <= {0, 1, 3}
    assert others
    last = [stage.ranks for stage in found[-1].stages if stage.name == "training"]
    assert last, first
    assert len(found) < 20, "a record per change, and of progress one per five seconds"


def test_the_slowest_rank_tells_the_progress() -> None:
    stages = [
        RankStage(name="pull", ranks=(3,), done=20, total=40, unit="bytes"),
        RankStage(name="loading", ranks=(0,)),
        RankStage(name="pull", ranks=(1,), done=10, total=100, unit="bytes"),
        RankStage(name="loading", ranks=(2,)),
    ]
    assert merge(stages) == (
        RankStage(name="loading", ranks=(0, 2)),
        RankStage(name="pull", ranks=(1, 3), done=10, total=100, unit="bytes"),
    )


def test_records_in_a_log() -> None:
    record = RunStages(
        stages=(
            RankStage(name="pull", ranks=(0, 1, 2, 8), done=1, total=2, unit="bytes"),
            RankStage(name="waiting", ranks=(3,), is_waiting=True),
        ),
        ranks_per_node=4,
    )
    line = record.to_line()
    assert '"0-2,8"' in line
    assert read_stages(line) == record
    assert read_stages(f"[rank0]: {line}") == record
    for broken in ('{"stages": 1}', '{"stages": [{}], "ranks_per_node": 1}', '"stages" of life'):
        assert read_stages(broken) is None


def test_the_innermost_stage_of_the_main_thread_counts() -> None:
    enter_stage("reading")
    with progress("pull", total=3, unit="files") as advance:
        advance(2)
        inner = current_stage()
        assert inner is not None
        assert (inner.name, inner.done, inner.total, inner.unit) == ("pull", 2, 3, "files")
        enter_stage("loading")
        assert current_stage() is inner
    with stage("waiting", is_waiting=True) as waits:
        assert current_stage() is waits
    found = current_stage()
    assert found is not None
    assert found.name == "loading"


def test_worker_on_a_full_disk_goes_on_with_its_heartbeat() -> None:
    enter_stage("loading")
    ended = threading.Event()
    beat = threading.Thread(target=worker._beat, args=(Path("/dev/full"), ended))
    beat.start()
    beat.join(timeout=0.3)
    assert beat.is_alive()
    ended.set()
    beat.join(timeout=5)
