"""Follows the validation loss: keeps the best weights, and stops a run that gets no better."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tita.storage.files import atomic_path
from tita.terminal import say
from tita.train.group import from_rank_0
from tita.train.validation import read_logs

_STATE, _WEIGHTS = "state.json", "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    step: int = 0
    """Of the least validation loss; 0 before the first evaluation."""
    loss: float = float("inf")
    num_worse: int = 0
    """Evaluations since then."""


class BestWeights(TrainerCallback):  # type: ignore[misc]
    """The best evaluation of a run so far, and its weights if they are kept.

    Its folder is part of every checkpoint, so that a run that is resumed in another pod has both.
    """

    def __init__(self, folder: Path, *, keep: bool, patience: int | None) -> None:
        """Keep everything in `folder`.

        Args:
            folder: on rank 0's node; `Checkpoints` saves and restores it.
            keep: whether the weights are kept too.
            patience: evaluations in a row without a lower loss after which the run stops.
        """
        self._folder = folder
        self._keep = keep
        self._patience = patience
        self._state = _State()
        self.save: Callable[[Path], None]
        """Saves the weights in a folder; every rank calls it. Set after the trainer is built."""

    @property
    def kept(self) -> Path | None:
        """The weights to keep; None for those that the trainer has."""
        return self._folder / _WEIGHTS if self._keep and self._state.step else None

    @property
    def step(self) -> int | None:
        """The step of the weights to keep; None for the last one."""
        return self._state.step if self._keep and self._state.step else None

    @property
    def _is_over(self) -> bool:
        return self._patience is not None and self._state.num_worse >= self._patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continue where the checkpoint was."""

        def read() -> _State:
            path = self._folder / _STATE
            return _State(**json.loads(path.read_text())) if path.is_file() else _State()

        self._state = from_rank_0(read)
        if self._is_over:
            # It was interrupted after it had stopped; transformers takes one more step.
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate and log the last step too, and log every step that is evaluated."""
        is_last = state.global_step >= state.max_steps
        control.should_evaluate = control.should_evaluate or is_last
        control.should_log = control.should_log or control.should_evaluate

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Save the weights if they are the best ones; stop the run if they are not for long."""
        figures = read_logs(metrics or {})
        assert figures is not None
        if figures.loss < self._state.loss:
            if self._keep:
                self.save(self._folder / _WEIGHTS)
            self._state = _State(step=state.global_step, loss=figures.loss)
        else:
            self._state = replace(self._state, num_worse=self._state.num_worse + 1)
        if state.is_world_process_zero:
            self._folder.mkdir(exist_ok=True)
            # A new file: checkpoints that wait for their upload have hard links to the old one.
            with atomic_path(self._folder / _STATE) as temporary:
                temporary.write_text(json.dumps(asdict(self._state)))
        if self._is_over:
            if state.is_world_process_zero and not control.should_training_stop:
                say(
                    f"train-dpo: stopping at step {state.global_step} of {state.max_steps}: the "
                    f"validation loss is least at step {self._state.step} ({self._state.loss:.4f})"
                )
            control.should_training_stop = True
