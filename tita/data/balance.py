"""Leaves out preference pairs until no frequent short answer is chosen more often than rejected."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tita.data.record_table import take
from tita.data.shortcuts import question_kind, short_answer
from tita.records import Pair

MIN_PAIRS = 5
"""Answers in fewer pairs are no habit that a model could learn, and may stay skewed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedPairs:
    """The pairs that stay, and what was left out."""

    pairs: Sequence[Pair]
    """In their order."""
    left_out: dict[str, int]
    """Number of pairs that were left out, by their chosen short answer."""

    def describe(self) -> str:
        """For example "138 of 1,200 pairs left out: 'no' 130, '3' 8"."""
        number = sum(self.left_out.values())
        names = ", ".join(f"{name!r} {n}" for name, n in list(self.left_out.items())[:5])
        more = ", ..." if len(self.left_out) > 5 else ""
        text = f"{number:,} of {number + len(self.pairs):,} pairs left out"
        return f"{text}: {names}{more}" if number else text


def balance_answers(pairs: Sequence[Pair], *, seed: int) -> BalancedPairs:
    """Leave out as few pairs as possible so that short answers are not preferred as such.

    Afterwards no short answer that is in at least 5 pairs is chosen more often than rejected, over
    all and for each kind of question (`question_kind`) in which it is in at least 5 pairs. Pairs
    are the arcs of a flow from rejected to chosen answers, so the largest balanced subset is the
    solution of a linear program with integer vertices. Which of equal pairs stay depends on `seed`
    and the pairs alone.
    """
    arcs: dict[tuple[str, str | None, str | None], list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        chosen, rejected = short_answer(pair.chosen), short_answer(pair.rejected)
        if chosen != rejected:
            arcs[question_kind(pair.question), rejected, chosen].append(index)
    # Sorted, so that the solution does not depend on the order of the pairs.
    types = sorted(arcs, key=lambda arc: tuple(part or "" for part in arc))
    kept = _largest_circulation(types, [len(arcs[arc]) for arc in types])
    gone: Counter[str] = Counter()
    stays = np.ones(len(pairs), dtype=bool)
    for arc, number in zip(types, kept, strict=True):
        order = sorted(arcs[arc], key=lambda index: seeded_digest(pairs[index], seed=seed))
        stays[order[number:]] = False
        if len(order) > number:
            gone[str(arc[2])] += len(order) - number
    return BalancedPairs(
        pairs=take(pairs, np.flatnonzero(stays)),
        left_out=dict(gone.most_common()),
    )


def _largest_circulation(
    types: Sequence[tuple[str, str | None, str | None]], numbers: Sequence[int]
) -> list[int]:
    """How many arcs of each type (kind, rejected, chosen) stay."""
    # A second of imports, which only a balanced run needs.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    appearances: Counter[tuple[str, str] | str] = Counter()
    for (kind, *answers), number in zip(types, numbers, strict=True):
        for answer in answers:
            if answer is not None:
                appearances[kind, answer] += number
                appearances[answer] += number
    nodes = {
        name: row for row, name in enumerate(n for n, k in appearances.items() if k >= MIN_PAIRS)
    }
    rows, columns, signs = [], [], []
    for column, (kind, *answers) in enumerate(types):
        for answer, sign in zip(answers, (-1.0, 1.0), strict=True):
            for name in ((kind, answer), answer):
                if answer is not None and name in nodes:
                    rows.append(nodes[name])
                    columns.append(column)
                    signs.append(sign)
    if not rows:
        return list(numbers)
    matrix = coo_array((signs, (rows, columns)), shape=(len(nodes), len(types))).tocsr()
    solution = milp(
        -np.ones(len(types)),
        constraints=LinearConstraint(matrix, ub=np.zeros(len(nodes))),
        bounds=Bounds(0, np.asarray(numbers, float)),
        integrality=np.ones(len(types)),
    )
    # Keeping no pair satisfies every constraint, so that there is always a solution.
    assert solution.success, solution.message
    return [round(value) for value in solution.x]


def seeded_digest(pair: Pair, *, seed: int) -> bytes:
    """A digest of a seed and a pair: random numbers that do not depend on the other pairs."""
    text = "\0".join((str(seed), pair.id, pair.image, pair.question, pair.chosen, pair.rejected))
    return hashlib.sha256(text.encode()).digest()
