"""Training as pods do it: what it leaves, and that it ends the same whatever happens on the way."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.comparing import largest_difference
from tita.demo.models import demo_model_path
from tita.errors import ExitCode
from tita.launch.progress import read_progress
from tita.records import TrainProgress
from tita.storage import open_store

Start = Callable[..., Any]
MODEL = "runs/a/model"

pytestmark = [pytest.mark.slow]


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
    assert run["images"]["digest"]
    assert run["packages"]["torch"] == torch.__version__
    assert lines[-1] == TrainProgress(**run["last"])
    assert lines[-1].tokens_per_s > lines[-1].samples_per_s > 0
    assert largest_difference(demo_model_path("reward"), undisturbed / MODEL) > 0
    told = json.loads((folder / "model/config.json").read_text())
    assert told["image_aspect_ratio"] == "pad"
    assert (folder / "loss.svg").read_text().startswith("<")
    assert list((folder / "tensorboard").glob("events.out.tfevents*"))
    assert not list(store.list("runs/a/checkpoints")), "checkpoints outlive their use"
    assert list(store.list("cache/reference/"))


def test_after_a_kill_another_pod_with_an_empty_disk_goes_on_from_s3(
    start: Start, undisturbed: Path, tmp_path: Path, s3_environment: dict[str, str]
) -> None:
    uri = s3_environment["TITA_STORE"]

    def pod(name: str) -> dict[str, str]:
        (tmp_path / name).mkdir()
        return {
            "TITA_SCRATCH_DIR": str(tmp_path / name),
            "TITA_CACHE_DIR": str(tmp_path / name / "cache"),
        }

    ended = kill_a_worker(start(uri, env=pod("one")), seed=2)
    assert ended.code == 128 + signal.SIGKILL, ended.text
    store = open_store(uri)
    saved = [entry for entry in store.list("runs/a/checkpoints") if "manifest" in entry.key]
    again = start(uri, env=pod("other")).finish()
    assert again.code == 0, again.text
    # An upload may have been under way when the worker died; then it counts for nothing.
    assert ("going on from step" in again.text) == bool(saved), again.text
    assert "reference log-probabilities from the store" in again.text
    assert not list(store.list("runs/a/checkpoints"))
    there = store.pull_tree("runs/a", into=tmp_path / "there")
    assert largest_difference(undisturbed / MODEL, there / "model") <= 1e-6


TWENTY = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(100, 120)]


@pytest.mark.parametrize("seed", [1, *TWENTY])
def test_a_killed_worker_changes_nothing(
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


def test_a_signal_before_the_first_step_is_obeyed_at_once(start: Start, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {"FAULT": "slow-reference", "TITA_SCRATCH_DIR": str(scratch)}
    job = start(tmp_path / "store", env=env)
    job.run_until_said("takes its time")
    job.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    ended = job.finish()
    assert ended.code == ExitCode.TERMINATED, ended.text
    assert "stopped by SIGTERM before a first step" in ended.text
    # The first rank waits in a collective for one that sleeps on.
    assert time.monotonic() - began < 60
    assert not list(scratch.iterdir())


def test_a_mistake_is_told_however_long_the_first_rank_takes(start: Start, tmp_path: Path) -> None:
    """torchrun sends it a SIGTERM when the other one is gone; the code must be the mistake's."""
    ended = start(tmp_path, env={"FAULT": "slow-word"}, batch_size=64).finish()
    assert ended.code == ExitCode.USER, ended.text
    assert "48 pairs are less than one batch of 128" in ended.text


def test_memory_that_runs_out_is_told_with_the_setting_to_change(
    start: Start, tmp_path: Path
) -> None:
    ended = start(tmp_path, env={"FAULT": "oom"}).finish()
    assert ended.code == ExitCode.OUT_OF_MEMORY, ended.text
    assert "rank 1: CUDA out of memory" in ended.text
    assert "--set batch_size=2 --set gradient_accumulation=2" in ended.text
    assert "Traceback" not in ended.text


@pytest.mark.soak
def test_a_rank_that_hangs_is_ended(start: Start, tmp_path: Path) -> None:
    job = start(tmp_path, env={"FAULT": "hang"}, hang_timeout_s=8)
    job.run_until(1)
    began = time.monotonic()
    ended = job.finish()
    assert ended.code == ExitCode.HUNG, ended.text
    assert "rank 1 stood still" in ended.text
    assert time.monotonic() - began < 60


@pytest.mark.soak
def test_a_rank_that_is_stopped_is_ended(start: Start, tmp_path: Path) -> None:
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


@pytest.mark.soak
def test_a_kill_in_the_warm_up_changes_nothing(start: Start, tmp_path: Path) -> None:
    changes = {"sft": {"steps": 6}}
    assert start(tmp_path / "whole", **changes).finish().code == 0
    job = start(tmp_path / "killed", **changes)
    job.run_until_said("warm-up step 4/6")
    os.kill(job.workers()[0], signal.SIGKILL)
    assert job.finish().code == 128 + signal.SIGKILL
    again = start(tmp_path / "killed", **changes).finish()
    assert again.code == 0, again.text
    assert "warm-up step 1/6" not in again.text
    assert largest_difference(tmp_path / "whole" / MODEL, tmp_path / "killed" / MODEL) <= 1e-6


@pytest.mark.soak
def test_a_kill_in_a_later_epoch_changes_nothing(start: Start, data: Any, tmp_path: Path) -> None:
    """Epochs whose last batch is not whole: 42 pairs by 8."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(data.pairs.read_text().splitlines()[:42]))
    changes = {"pairs": str(pairs), "max_steps": 15, "save_steps": 1}
    assert start(tmp_path / "whole", **changes).finish().code == 0
    job = start(tmp_path / "killed", **changes)
    job.run_until(9)
    os.kill(job.workers()[1], signal.SIGKILL)
    assert job.finish().code == 128 + signal.SIGKILL
    again = start(tmp_path / "killed", **changes).finish()
    assert again.code == 0, again.text
    assert '"step": 6,' not in again.text
    assert largest_difference(tmp_path / "whole" / MODEL, tmp_path / "killed" / MODEL) <= 1e-6


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


def test_ranks_wait_for_the_first_as_long_as_it_lives(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    """The model takes longer to the store than any collective may take, or rank 0 dies over it."""
    slow = {"env": {"FAULT": "slow-model"}, "hang_timeout_s": 6}
    killed = start(tmp_path, **slow)
    killed.run_until_said("the model is on its way")
    os.kill(killed.workers()[0], signal.SIGKILL)
    ended = killed.finish()
    assert ended.code == 128 + signal.SIGKILL, ended.text
    assert "rank 1: no other rank has shown life" in ended.text
    told = start(tmp_path, **slow)
    told.run_until_said("the model is on its way")
    told.process.send_signal(signal.SIGTERM)
    ended = told.finish()
    assert ended.code == 0, ended.text
    assert "SIGTERM after the last step: the model is saved all the same" in ended.text
    # What the kill had interrupted was not trained again.
    assert '"step":' not in ended.text
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6
    assert not list(open_store(str(tmp_path)).list("runs/a/checkpoints"))


@pytest.mark.soak
def test_a_run_whose_model_the_store_refuses_goes_on(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    """The store takes checkpoints, but not the model: what was trained is not lost."""
    ended = start(tmp_path, env={"FAULT": "no-model"}).finish()
    assert ended.code == ExitCode.RETRY, ended.text
    again = start(tmp_path).finish()
    assert again.code == 0, again.text
    assert "going on from step 6" in again.text
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6
    assert not list(open_store(str(tmp_path)).list("runs/a/checkpoints"))
