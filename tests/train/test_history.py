"""The curves of a run."""

import re
from typing import Any

from tita.records import TrainProgress
from tita.train.history import plot_curve


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
