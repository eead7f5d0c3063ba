"""Workers are killed at random points; in the end every pair exists once."""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.pairs.conftest import NUM_SCENES
from tests.pairs.workers import start
from tita.data import read_pairs
from tita.errors import ExitCode
from tita.pairs.build import PairBatch
from tita.records import Pair
from tita.storage import Store


@pytest.fixture(params=["directory", "s3"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "s3":
        environment: dict[str, str] = request.getfixturevalue("s3_environment")
        return environment
    monkeypatch, tmp_path = (request.getfixturevalue(n) for n in ("monkeypatch", "tmp_path"))
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    return dict(os.environ)


def ids(store: Store, run: str) -> list[str]:
    return [pair.id for pair in read_pairs(store.pull_tree(f"pairs/{run}") / "pairs.jsonl")]


def kill_workers(
    folder: Path, environment: Mapping[str, str], store: Store, *, deaths: int, seed: int
) -> None:
    """Kill workers at random steps, finish their runs, and compare the trees.

    When a run completes before enough kills, another run starts.
    """
    undisturbed = start(folder, environment, run="undisturbed")
    undisturbed.succeed()
    num_steps = int(undisturbed.steps.read_text())
    generator = random.Random(seed)
    runs, died, alive = ["killed-0"], 0, False
    while died < deaths:
        if alive:
            runs.append(f"killed-{len(runs)}")
        shape = {"rank": 1, "world_size": 2} if died % 3 == 2 else {}
        at = generator.randint(1, num_steps)
        code, stderr = start(folder, environment, run=runs[-1], die_at=at, **shape).end()
        assert code in (0, -9), stderr
        died += code == -9
        alive = code == 0 and not shape
    for run in runs:
        both = [start(folder, environment, run=run, rank=r, world_size=2) for r in (0, 1)]
        for worker in both:
            worker.succeed()
        assert store.get(f"pairs/{run}/pairs.jsonl") == store.get("pairs/undisturbed/pairs.jsonl")
        found = ids(store, run)
        assert len(found) == len(set(found)) > NUM_SCENES
    assert not list(store.list("parts/"))


@pytest.mark.slow
def test_killed_workers_leave_every_pair_once(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    kill_workers(tmp_path, environment, store, deaths=3, seed=7)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_workers_killed_many_times_leave_every_pair_once(
    store: Store, environment: dict[str, str], tmp_path: Path, seed: int
) -> None:
    kill_workers(tmp_path, environment, store, deaths=40, seed=seed)


@pytest.mark.slow
def test_a_worker_that_waits_too_long_exits_with_lost_peer(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    two = {"world_size": 2, "peer_timeout_s": 8}
    code, stderr = start(tmp_path, environment, rank=0, **two).end()
    assert code == ExitCode.LOST_PEER
    assert "3 of 6 batches are missing and none was finished" in stderr
    assert "a restart continues the run" in stderr
    done = [info.key for info in store.list("parts/r/")]
    assert len(done) == 3
    # A worker that builds this batch again would overwrite it.
    marked = Pair(
        id="marked/diffusion",
        image="texvqa/train_images/train-00001.png",
        question="What?",
        chosen="a",
        rejected="b",
    )
    store.put(done[0], PairBatch(pairs=(marked,)).to_json())
    start(tmp_path, environment, rank=1, **two).succeed()
    assert store.read_manifest("pairs/r") is None
    assert "pairs in pairs/r" in start(tmp_path, environment, rank=0, **two).succeed()
    assert ids(store, "r")[0] == marked.id
    assert not list(store.list("parts/"))


@pytest.mark.slow
def test_workers_restarted_after_the_end_do_nothing(
    store: Store, environment: dict[str, str], scenes: Path, tmp_path: Path
) -> None:
    start(tmp_path, environment).succeed()
    manifest = store.read_manifest("pairs/r")
    left_over = f"parts/r/{'0' * 12}/batch-000000.json"
    store.put(left_over, b"of another recipe")
    for rank in (1, 0):
        stderr = start(tmp_path, environment, rank=rank, world_size=2).succeed()
        assert ("already exists" in stderr) == (rank == 0)
    assert store.read_manifest("pairs/r") == manifest
    assert [info.key for info in store.list("parts/")] == [left_over]
    code, stderr = start(tmp_path, environment, batch_size=4).end()
    assert code == ExitCode.USER
    assert "this tree was made with another recipe; choose another run name" in stderr
    changed = tmp_path / "data"
    shutil.copytree(scenes, changed)
    questions = changed / "train.jsonl"
    questions.write_text(questions.read_text().replace("?", " now?", 1))
    store.push_tree(changed, "data")
    code, stderr = start(tmp_path, environment).end()
    assert code == ExitCode.USER
    said = "pairs/r: this tree was built from other questions than data/train.jsonl has now"
    assert f"{said}; choose another run name" in stderr
