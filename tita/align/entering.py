"""Requests whose prompts are being taken in, and which of them are next."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tita.align.prefill import Prefill
from tita.align.rows import Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Entering:
    """One request on its way in."""

    row: Row
    prefills: dict[str, Prefill]
    """By the model's role."""
    logits: "dict[str, Tensor]" = field(default_factory=dict)
    """[B, V] of the first new tokens of those that came in together, once their prompts are in."""

    @property
    def num_pieces(self) -> int:
        return sum(len(prefill.pieces) for prefill in self.prefills.values())

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are still to be taken in, over all models."""
        return sum(
            end - start for prefill in self.prefills.values() for start, end in prefill.pieces
        )

    @property
    def length(self) -> int:
        return self.prefills["base"].length

    @property
    def kind(self) -> tuple[Hashable, ...] | None:
        """Rows of the same kind come in together; None: only by itself."""
        kinds = [(role, prefill.kind) for role, prefill in self.prefills.items()]
        return None if None in dict(kinds).values() else tuple(kinds)


def next_group(
    entering: Mapping[Hashable, Entering], *, oldest: bool, budget: int
) -> list[Hashable]:
    """The request that is next, and others that can come in together with it.

    Args:
        entering: in the order in which they came.
        oldest: take the oldest, so that long ones come in at all; else the shortest, so that short
            ones do not wait for long ones. The caller does both in turn.
        budget: tokens that may be taken in together.
    """
    if oldest:
        first = next(iter(entering))
    else:
        first = min(entering, key=lambda key: entering[key].num_left)
    kind = entering[first].kind
    group, longest = [first], entering[first].length
    if kind is None:
        return group
    for key, each in entering.items():
        wider = max(longest, each.length)
        if key != first and each.kind == kind and wider * (len(group) + 1) <= budget:
            group.append(key)
            longest = wider
    return group
