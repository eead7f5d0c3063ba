"""The curves of a run."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from tita.records import TrainProgress, read_progress
from tita.storage import manifest, open_store, resolve
from tita.storage.manifest import build_manifest, sha256_of
from tita.train import history
from tita.train.history import ProgressLines, divergence_warning, plot_curve, read_lines


def line(step: int, **figures: Any) -> TrainProgress:
    own = {"steps": 3, "reward_margin": 0.0, "reward_accuracy": 0.5, "learning_rate": 1e-6}
    speed = {"samples_per_s": 1.0, "tokens_per_s": 9.0, "seconds_left": 0.0, "peak_memory_bytes": 1}
    return TrainProgress(step=step, loss=0.7, **own | speed | figures)


def test_a_single_point_is_visible() -> None:
    assert re.search(r'<g clip-path="[^"]+">\s*<use ', plot_curve([line(3)], "loss"))


def test_step_ticks_are_integers() -> None:
    drawn = plot_curve([line(1), line(2, reward_accuracy=0.7), line(3)], "reward_accuracy")
    assert ">2<" in drawn
    assert ">1.5<" not in drawn
    assert ">2.5<" not in drawn


def test_last_step_is_logged(tmp_path: Path) -> None:
    """Whatever `logging_steps` is, also in a run that is shorter."""
    reporter = ProgressLines(tmp_path / "train.jsonl", pairs_per_step=1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), logging_steps=10, max_steps=3, report_to=[], use_cpu=True,
        per_device_train_batch_size=1, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    data = [{"x": torch.ones(1)}] * 3
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data, callbacks=[reporter])
    trainer.compute_loss = lambda model, inputs, **_: model(inputs["x"]).mean()
    trainer.train()
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [read_progress(text).step for text in lines] == [3]  # type: ignore[union-attr]


def test_a_run_that_diverged_is_recorded_in_json(tmp_path: Path) -> None:
    """Python writes NaN and Infinity, which jq and JavaScript refuse."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "train.jsonl"
    reporter = ProgressLines(path, pairs_per_step=1)
    logs = {"loss": math.nan, "rewards/margins": math.inf, "rewards/accuracies": 0.5}
    state = TrainerState(global_step=2, max_steps=3, is_world_process_zero=True)
    reporter.on_log(None, state, None, logs)
    found = json.loads(path.read_text(), parse_constant=refuse)["progress"]
    assert (found["loss"], found["reward_margin"], found["reward_accuracy"]) == (None, None, 0.5)
    assert found["image_margin"] is None
    (read,) = read_lines(path)
    assert math.isnan(read.loss)
    assert math.isnan(read.reward_margin)
    assert read.image_margin is None
    assert "<svg" in plot_curve([read], "loss")
    fine = replace(read, step=1, loss=0.7)
    assert divergence_warning([fine]) is None
    assert divergence_warning([fine, read, replace(fine, step=3)]) is None, "it recovered"
    warning = divergence_warning([fine, read, replace(read, step=3)])
    assert warning == ("the loss is nan from step 2 on: training diverged; lower learning_rate")


def test_the_pairs_in_a_run_are_named_by_digests_that_are_known(
    tmp_path: Path, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run no folder of images is read again."""
    folder = tmp_path / "pairs"
    (folder / "part" / "images").mkdir(parents=True)
    rows = folder / "part" / "pairs.jsonl"
    rows.write_text('{"id": "1"}\n')
    (folder / "part" / "images" / "1.png").write_bytes(b"image")
    whole, part = (build_manifest(each).digest for each in (folder, folder / "part"))
    read: list[str] = []

    def sha256(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    stores = [open_store(tmp_path / "store"), open_store(s3_environment["TITA_STORE"])]
    places = []
    for store in stores:
        store.push_tree(folder, "pairs/a")
        places += [resolve("pairs/a", store=store), resolve("pairs/a/part", store=store)]
    for module in (history, manifest):
        monkeypatch.setattr(module, "sha256_of", sha256)
    assert [history._digest_pairs(path) for path in places] == [whole, part] * 2
    assert read == []
    only_rows = build_manifest(folder / "part", paths=["pairs.jsonl"]).digest
    read.clear()
    assert history._digest_pairs(folder / "part") == only_rows
    assert history._digest_pairs(rows) == sha256_of(rows)
    assert read == ["pairs.jsonl"] * 2
