"""On real GPUs: bf16, NCCL and every DeepSpeed stage; one process per GPU, at most two."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.comparing import largest_difference
from tita.demo.models import demo_model_path
from tita.errors import ExitCode
from tita.recipes import TrainRecipe, validate_recipe
from tita.records import read_progress
from tita.storage import open_store
from tita.train.memory import WorldSize
from tita.train.preflight import check_memory
from tita.train.training_data import read_inputs

Start = Callable[..., Any]
MODEL = "runs/a/model"
# The job's defaults, which the tests on CPUs override.
DEFAULTS = {"dtype": "bfloat16", "gradient_checkpointing": True, "freeze_vision": True}

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture
def procs() -> int:
    """Worker processes: one per GPU."""
    import torch

    return min(2, torch.cuda.device_count())


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("zero2", {}),
        ("zero3", {}),
        ("zero3_offload", {}),
        ("zero2", {"lora": {"rank": 4}}),
        ("zero3", {"lora": {"rank": 4}, "sft": {"steps": 2}}),
    ],
    ids=["zero2", "zero3", "offload", "zero2-lora", "zero3-lora-warm-up"],
)
def test_it_trains_in_bfloat16_under_nccl(
    start: Start, tmp_path: Path, procs: int, stage: str, changes: dict[str, Any]
) -> None:
    # NCCL's startup lines show that it runs the collectives, not gloo.
    env = {"NCCL_DEBUG": "INFO"} if procs > 1 else {}
    ended = start(tmp_path, env=env, procs=procs, deepspeed=stage, **DEFAULTS | changes).finish()
    assert ended.code == 0, ended.text
    assert procs == 1 or "NCCL INFO" in ended.text
    lines = [line for line in map(read_progress, ended.text.splitlines()) if line]
    assert lines[0].loss == pytest.approx(0.6931, abs=0.01)
    assert lines[-1].peak_memory_bytes > 0
    assert largest_difference(demo_model_path("reward"), tmp_path / MODEL) > 0
    run = json.loads((tmp_path / "runs/a/run.json").read_text())
    assert run["hardware"]["device"] != "cpu"


def test_a_killed_worker_changes_little(start: Start, tmp_path: Path, procs: int) -> None:
    """Not bit-identical: the order of summation in some kernels varies."""
    changes = DEFAULTS | {"dtype": "float32"}
    assert start(tmp_path / "whole", procs=procs, **changes).finish().code == 0
    job = start(tmp_path / "killed", procs=procs, **changes)
    chance = random.Random(1)
    job.run_until(chance.randint(2, 5))
    os.kill(chance.choice(job.workers()), signal.SIGKILL)
    assert job.finish().code == 128 + signal.SIGKILL
    again = start(tmp_path / "killed", procs=procs, **changes).finish()
    assert again.code == 0, again.text
    assert largest_difference(tmp_path / "whole" / MODEL, tmp_path / "killed" / MODEL) <= 1e-4


def test_running_out_of_memory_is_reported(start: Start, tmp_path: Path, procs: int) -> None:
    ended = start(tmp_path, env={"FAULT": "oom"}, procs=procs, **DEFAULTS).finish()
    assert ended.code == ExitCode.OUT_OF_MEMORY, ended.text
    assert "CUDA out of memory" in ended.text
    assert "--set batch_size=2 --set gradient_accumulation=2" in ended.text


def test_preflight_reads_the_memory_of_the_device(data: Any, tmp_path: Path) -> None:
    import torch

    from tita.train.preflight import free_memory

    on_gpu, free = free_memory()
    assert on_gpu
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
    own = {"model": str(demo_model_path("reward")), "pairs": str(data.pairs)}
    recipe = validate_recipe(TrainRecipe, own | {"images": str(data.images)})
    model = read_inputs(recipe, store=open_store(str(tmp_path))).model
    world = WorldSize(total=1, local=1)
    check_memory(recipe, start=model, world=world, tokens=64, free=free, on_gpu=True)
