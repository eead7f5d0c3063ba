"""Runs with image preference: interruptions, DeepSpeed stages and adapters change nothing."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.comparing import largest_difference
from tita.storage import open_store
from tita.train.history import evaluations, read_lines

Start = Callable[..., Any]
MODEL = "runs/a/model"
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
TERMS: dict[str, Any] = {
    "image_preference": {"weight": 1.0, "negative": "other"},
    "validation": 0.25,
    "eval_steps": 2,
    "keep": "best",
}

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def with_terms(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store after an undisturbed run with both terms."""
    store = tmp_path_factory.mktemp("with-terms")
    ended = start(store, **TERMS).finish()
    assert ended.code == 0, ended.text
    return store


@pytest.mark.soak
def test_a_killed_run_with_negative_images_resumes(
    start: Start, with_terms: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = start(tmp_path, **TERMS)
    job.run_until(3)
    os.kill(job.workers()[0], signal.SIGKILL)
    assert job.finish().code == 128 + signal.SIGKILL
    again = start(tmp_path, **TERMS).finish()
    assert again.code == 0, again.text
    # Those of the negative images too.
    assert "reference log-probabilities read from the store" in again.text
    assert largest_difference(with_terms / MODEL, tmp_path / MODEL) <= 1e-6
    assert largest_difference(with_terms / MODEL, undisturbed / MODEL) > 1e-4
    cached = open_store(str(tmp_path)).list("cache/reference/")
    found = [{**np.load(tmp_path / each.key)} for each in cached]
    sizes = [{name: len(some) for name, some in values.items()} for values in found]
    sizes.sort(key=lambda each: each["chosen"])
    assert sizes == [
        {"chosen": 12, "rejected": 12, "other_chosen": 12, "other_rejected": 12},
        {"chosen": 36, "rejected": 36, "other_chosen": 36},
    ]
    assert all((values["chosen"] != values["other_chosen"]).any() for values in found)
    steps, undisturbed_steps = (
        read_lines(store / "runs/a/train.jsonl") for store in (tmp_path, with_terms)
    )
    assert steps[0].image_margin == pytest.approx(0, abs=1e-5)
    assert all(step.image_accuracy is not None for step in steps)
    evaluated = evaluations(steps)
    assert [figures.step for figures in evaluated] == [2, 4, 5]
    for one, other in zip(evaluated, evaluations(undisturbed_steps), strict=True):
        assert asdict(one) == pytest.approx(asdict(other), abs=1e-5)
    facts = json.loads((tmp_path / "runs/a/run.json").read_text())["validation"]
    assert facts["loss"] == min(figures.loss for figures in evaluated)
    assert (facts["pairs"], facts["images"], facts["source"]) == (12, 4, 0.25)


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["zero3", "zero3_offload"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_stages_give_equal_weights(
    start: Start, tmp_path: Path, stage: str, lora: dict[str, Any] | None
) -> None:
    changes = TERMS | ({"lora": lora} if lora else {})
    for name in ("zero2", stage):
        ended = start(tmp_path / name, deepspeed=name, **changes).finish()
        assert ended.code == 0, ended.text
    assert largest_difference(tmp_path / "zero2" / MODEL, tmp_path / stage / MODEL) <= 1e-6


@pytest.mark.soak
@pytest.mark.parametrize("negative", ["crop", "noise"])
def test_other_negatives_train(start: Start, tmp_path: Path, negative: str) -> None:
    ended = start(tmp_path, image_preference={"negative": negative}, max_steps=2).finish()
    assert ended.code == 0, ended.text
    assert '"image_accuracy": ' in ended.text
