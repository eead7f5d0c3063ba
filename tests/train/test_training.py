"""Training as pods do it: what it leaves, and that it ends the same whatever happens on the way."""

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tita.demo.models import demo_model_path
from tita.errors import ExitCode
from tita.launch.progress import read_progress
from tita.storage import open_store
from tita.vlm import load_vlm

Start = Callable[..., Any]
MODEL = "runs/a/model"

pytestmark = [pytest.mark.slow]


def weights(model: Path) -> dict[str, torch.Tensor]:
    """As `from_pretrained` loads them: files of ZeRO-3 and of merged LoRA have other names."""
    state: dict[str, torch.Tensor] = load_vlm(str(model), dtype="float32").model.state_dict()
    return state


def largest_difference(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def kill_a_worker(job: Any, *, seed: int) -> Any:
    chance = random.Random(seed)
    job.run_until(chance.randint(2, 5))
    workers = job.workers()
    assert len(workers) == 2
    killed = time.monotonic()
    os.kill(chance.choice(workers), signal.SIGKILL)
    ended = job.finish()
    assert time.monotonic() - killed < 60, "the others did not stop in time"
    return ended


def test_a_run_leaves_a_model_that_moved_and_its_history(undisturbed: Path) -> None:
    store = open_store(str(undisturbed))
    folder = store.pull_tree("runs/a")
    lines = [read_progress(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line.step for line in lines if line] == [1, 2, 3, 4, 5, 6]
    run = json.loads((folder / "run.json").read_text())
    assert run["start_model"]["digest"]
    assert run["pairs"]["number"] == 48
    assert largest_difference(demo_model_path("reward"), undisturbed / MODEL) > 0
    assert (folder / "loss.svg").read_text().startswith("<")
    assert list((folder / "tensorboard").glob("events.out.tfevents*"))
    assert not list(store.list("runs/a/checkpoints")), "checkpoints outlive their use"
    assert list(store.list("cache/reference/"))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_worker_changes_nothing(
    start: Start, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    ended = kill_a_worker(start(tmp_path), seed=seed)
    assert ended.code == 128 + signal.SIGKILL, ended.text
    saved = list((tmp_path / "runs/a/checkpoints").glob("*/node-0/manifest.json"))
    again = start(tmp_path).finish()
    assert again.code == 0, again.text
    # An upload may have been under way when the worker died; then it counts for nothing.
    assert ("going on from step" in again.text) == bool(saved), again.text
    assert "reference log-probabilities from the store" in again.text
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_twenty_killed_workers_change_nothing(
    start: Start, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    assert kill_a_worker(start(tmp_path), seed=seed).code == 128 + signal.SIGKILL
    assert start(tmp_path).finish().code == 0
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6


def test_eviction_saves_and_a_torn_checkpoint_is_passed_over(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    job = start(tmp_path)
    job.run_until(3)
    job.process.send_signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == ExitCode.RETRY, ended.text
    saved = tmp_path / "runs/a/checkpoints"
    steps = sorted(int(folder.name) for folder in saved.iterdir())
    assert len(steps) >= 2
    torn = max((saved / f"{steps[-1]}").rglob("*.pt"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-100])
    again = start(tmp_path).finish()
    assert again.code == 0, again.text
    assert f"checkpoint {steps[-1]} is passed over" in again.text
    assert f"going on from step {steps[-2]}" in again.text
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
STAGES = [
    pytest.param("zero3", LORA),
    pytest.param("zero2", None, marks=pytest.mark.soak),
    pytest.param("zero3_offload", None, marks=pytest.mark.soak),
    pytest.param("zero2", LORA, marks=pytest.mark.soak),
    pytest.param("zero3", None, marks=pytest.mark.soak),
    pytest.param("zero3_offload", LORA, marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("stage", "lora"), STAGES)
def test_two_nodes_train_as_one_does(
    start: Start, undisturbed: Path, tmp_path: Path, stage: str, lora: dict[str, Any] | None
) -> None:
    shape = {"TITA_NUM_NODES": "2", "TITA_MASTER_PORT": str(free_port())}
    nodes = [
        start(
            tmp_path, env=shape | {"TITA_NODE_RANK": str(rank)}, procs=1, deepspeed=stage, lora=lora
        )
        for rank in range(2)
    ]
    for ended in [node.finish() for node in nodes]:
        assert ended.code == 0, ended.text
    moved = largest_difference(demo_model_path("reward"), tmp_path / MODEL)
    # More than nothing, and less than weights that were not found and drawn at random would be.
    assert 0 < moved < 0.05
    if lora is None:
        # LoRA has another course; full training must be what one node with ZeRO-2 does.
        assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-5


@pytest.mark.soak
def test_a_rank_that_hangs_is_ended(start: Start, tmp_path: Path) -> None:
    job = start(tmp_path, hang_timeout_s=8)
    job.run_until(2)
    stopped = job.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    try:
        ended = job.finish()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    # A stopped process obeys nothing but SIGKILL, which torchrun sends it after 30 s.
    assert ended.code in (ExitCode.HUNG, 128 + signal.SIGKILL), ended.text
    assert time.monotonic() - began < 90


def test_a_store_that_is_away_for_a_while(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    """The store's folder is a file for three seconds: every write to it fails."""
    job = start(tmp_path / "store")
    job.run_until(2)
    folder, aside = tmp_path / "store/runs", tmp_path / "aside"
    folder.mkdir(exist_ok=True)
    folder.rename(aside)
    folder.touch()
    time.sleep(3)
    folder.unlink()
    aside.rename(folder)
    ended = job.finish()
    assert ended.code == 0, ended.text
    assert "trying again" in ended.text
    assert largest_difference(undisturbed / MODEL, tmp_path / "store" / MODEL) <= 1e-6
