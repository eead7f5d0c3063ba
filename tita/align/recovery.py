"""Recovery from a failed step: undo it, find the request that broke it, and fit into memory."""

from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from tita.align.model_runner import ModelRunner, ParkedRow, RunnerMark
from tita.align.sequence import Sequence, SequenceMark


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of models and answers before a step, so that a step that fails leaves no trace."""

    runners: list[tuple[ModelRunner, RunnerMark]]
    sequences: list[tuple[Sequence, SequenceMark]]

    @classmethod
    def of(cls, runners: Mapping[str, ModelRunner], sequences: Items[Sequence]) -> "Checkpoint":
        return cls(
            [(runner, runner.mark()) for runner in runners.values()],
            [(sequence, sequence.mark()) for sequence in sequences],
        )

    def restore(self) -> None:
        """Undo what was added since; no row may have been removed."""
        for runner, mark in self.runners:
            runner.restore(mark)
        for sequence, before in self.sequences:
            sequence.restore(before)


@dataclass(frozen=True, slots=True)
class ParkedSequence:
    """An answer whose rows were moved to host memory; it goes on once they are back."""

    sequence: Sequence
    rows: dict[str, list[ParkedRow]]
    """By model."""


def halves(running: Mapping[Hashable, Sequence]) -> tuple[list[Hashable], list[Hashable]]:
    """Divide the requests of a failed step: newcomers from the others, else by age."""
    keys = sorted(running, key=lambda key: running[key].number)
    newcomers = [key for key in keys if len(running[key].token_ids) <= 1]
    if 0 < len(newcomers) < len(keys):
        return [key for key in keys if key not in newcomers], newcomers
    middle = len(keys) // 2
    return keys[:middle], keys[middle:]


class RowLimit:
    """How many answers may be in the models at a time, as far as memory has run out.

    Additive increase, multiplicative decrease, as in TCP: out of memory lowers the limit; once as
    many answers have ended as it allows, it rises by one.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._num_ended = 0

    def room(self, num_rows: int) -> bool:
        """Whether another row may join `num_rows` others."""
        return self._limit is None or num_rows < self._limit

    def lower(self, num_rows: int) -> None:
        """Memory ran out with more than `num_rows` rows."""
        self._limit, self._num_ended = max(num_rows, 1), 0

    def note_ended(self, number: int) -> None:
        """Answers have ended."""
        if self._limit is None:
            return
        self._num_ended += number
        if self._num_ended >= self._limit:
            self._num_ended -= self._limit
            self._limit += 1

    def clear(self) -> None:
        """The batch is empty: the next one may be as large as any."""
        self._limit = None
