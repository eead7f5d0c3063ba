"""Training as in pods: its results, which are the same after kills, evictions and outages."""

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
from tita.records import TrainProgress, read_progress
from tita.storage import open_store

Start = Callable[..., Any]
MODEL = "runs/a/model"

pytestmark = [pytest.mark.slow]


def kill_a_worker(job: Any, *, seed: int) -> Any:
    chance = random.Random(seed)
    job.run_until(chance.randint(2, 5))
    workers = job.workers()
    assert len(workers) == 2
    os.kill(chance.choice(workers), signal.SIGKILL)
    # torchrun would wait 540 s for the other rank, longer than `finish` does.
    return job.finish()


def test_a_run_writes_a_trained_model_and_its_history(undisturbed: Path) -> None:
    store = open_store(str(undisturbed))
    folder = store.pull_tree("runs/a")
    lines = [read_progress(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line.step for line in lines if line] == [1, 2, 3, 4, 5, 6]
    run = json.loads((folder / "run.json").read_text())
    assert run["start_model"]["digest"]
    assert run["pairs"]["number"] == 48
    assert (run["pairs"]["left_out"], run["pairs"]["shortcuts"]["num_pairs"]) == ({}, 48)
    assert run["images"]["digest"]
    assert run["packages"]["torch"] == torch.__version__
    assert lines[-1] == TrainProgress(**run["last"])
    assert lines[-1].tokens_per_s > lines[-1].samples_per_s > 0
    assert largest_difference(demo_model_path("reward"), undisturbed / MODEL) > 0
    config = json.loads((folder / "model/config.json").read_text())
    assert config["image_aspect_ratio"] == "pad"
    assert (folder / "loss.svg").read_text().startswith("<")
    assert list((folder / "tensorboard").glob("events.out.tfevents*"))
    assert not list(store.list("runs/a/checkpoints")), "checkpoints were not deleted"
    assert list(store.list("cache/reference/"))


def test_after_a_kill_a_new_pod_resumes_from_s3(
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
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["cache"]
    store = open_store(uri)
    saved = [entry for entry in store.list("runs/a/checkpoints") if "manifest" in entry.key]
    again = start(uri, env=pod("other")).finish()
    assert again.code == 0, again.text
    # An upload that the kill interrupted does not count.
    assert ("resuming from step" in again.text) == bool(saved), again.text
    assert "reference log-probabilities read from the store" in again.text
    assert not list(store.list("runs/a/checkpoints"))
    there = store.pull_tree("runs/a", into=tmp_path / "there")
    assert largest_difference(undisturbed / MODEL, there / "model") <= 1e-6


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_killed_worker_changes_nothing(
    start: Start, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    assert kill_a_worker(start(tmp_path), seed=seed).code == 128 + signal.SIGKILL
    assert start(tmp_path).finish().code == 0
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6


def test_a_kill_an_eviction_and_a_corrupt_checkpoint_change_nothing(
    start: Start, undisturbed: Path, sharded: Path
) -> None:
    """On images in shards, where `undisturbed` has files."""
    ended = start(sharded, images="images", env={"FAULT": "kill-reference"}).finish()
    assert ended.code == 128 + signal.SIGKILL, ended.text
    job = start(sharded, images="images")
    job.run_until_said("lengths and image digests read from the store")
    # Two batches of 4 pairs on each of 2 ranks.
    job.run_until_said("reference pass continues at pair 16 of 48")
    job.run_until(3)
    assert [path.suffix for path in (sharded / "cache/reference").iterdir()] == [".npz"]
    job.process.send_signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == ExitCode.RETRY, ended.text
    saved = sharded / "runs/a/checkpoints"
    steps = sorted(int(folder.name) for folder in saved.iterdir())
    assert len(steps) >= 2
    recorded = json.loads((saved / f"{steps[-1]}/node-0/manifest.json").read_text())["meta"]
    assert set(recorded["data"]) == {"version", "pairs", "images", "model"}
    torn = max((saved / f"{steps[-1]}").rglob("*.pt"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-100])
    again = start(sharded, images="images").finish()
    assert again.code == 0, again.text
    assert f"skipping checkpoint {steps[-1]}" in again.text
    assert f"resuming from step {steps[-2]}" in again.text
    assert largest_difference(undisturbed / MODEL, sharded / MODEL) <= 1e-6
    runs = [json.loads((store / "runs/a/run.json").read_text()) for store in (undisturbed, sharded)]
    assert runs[0]["images"]["digest"] == runs[1]["images"]["digest"]


def test_sigterm_before_the_first_step_ends_at_once(start: Start, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {"FAULT": "slow-reference", "TITA_SCRATCH_DIR": str(scratch)}
    job = start(tmp_path / "store", env=env)
    job.run_until_said("computes slowly")
    job.process.send_signal(signal.SIGTERM)
    # Rank 0 waits in a collective for the rank that sleeps, longer than `finish` waits.
    ended = job.finish()
    assert ended.code == ExitCode.TERMINATED, ended.text
    assert "stopped by SIGTERM before the first step" in ended.text
    assert not list(scratch.iterdir())


def test_a_slow_report_keeps_the_exit_code_of_a_mistake(start: Start, tmp_path: Path) -> None:
    """torchrun sends rank 0 a SIGTERM after rank 1 has exited; the code must be the mistake's."""
    ended = start(tmp_path, env={"FAULT": "slow-word"}, batch_size=64).finish()
    assert ended.code == ExitCode.USER, ended.text
    assert "48 pairs are less than one batch: 128" in ended.text


def test_running_out_of_memory_is_reported_with_a_remedy(start: Start, tmp_path: Path) -> None:
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
    assert "rank 1 is hung" in ended.text
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
    # A stopped process reacts only to SIGKILL, which torchrun sends after 30 s.
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
    """Epochs with a partial last batch: 42 pairs by 8."""
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


def test_a_store_that_is_unavailable_for_a_while(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    """The store's folder is a file for three seconds, so that every write fails."""
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
    assert "retrying in" in ended.text
    assert largest_difference(undisturbed / MODEL, tmp_path / "store" / MODEL) <= 1e-6


@pytest.mark.soak
def test_ranks_wait_for_rank_0_while_it_sends_heartbeats(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    """The upload of the model takes longer than the timeout of collectives, or rank 0 dies."""
    bounds = {"TITA_HEARTBEAT_TIMEOUT_S": "3"}
    slow = {"env": {"FAULT": "slow-model", **bounds}, "hang_timeout_s": 6}
    killed = start(tmp_path, **slow)
    killed.run_until_said("the upload is slow")
    os.kill(killed.workers()[0], signal.SIGKILL)
    ended = killed.finish()
    assert ended.code == 128 + signal.SIGKILL, ended.text
    assert "rank 1: no heartbeat from any other rank" in ended.text
    stopped = start(tmp_path, **slow)
    stopped.run_until_said("the upload is slow")
    stopped.process.send_signal(signal.SIGTERM)
    ended = stopped.finish()
    assert ended.code == 0, ended.text
    assert "SIGTERM after the last step; saving the model before exit" in ended.text
    # No step was trained again.
    assert '"step":' not in ended.text
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6
    assert not list(open_store(str(tmp_path)).list("runs/a/checkpoints"))


@pytest.mark.soak
def test_a_run_whose_upload_fails_resumes(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    """The store accepts checkpoints but not the model: no training is lost."""
    ended = start(tmp_path, env={"FAULT": "no-model"}).finish()
    assert ended.code == ExitCode.RETRY, ended.text
    again = start(tmp_path).finish()
    assert again.code == 0, again.text
    assert "resuming from step 6" in again.text
    assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-6
    assert not list(open_store(str(tmp_path)).list("runs/a/checkpoints"))
