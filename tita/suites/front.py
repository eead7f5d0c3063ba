"""The front of several methods by two figures, with its hypervolume; and quality against cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The methods that no other method beats in both figures."""

    names: Sequence[str]
    """From the best in the first figure to the best in the second."""
    hypervolume: float
    """Area that the front dominates, above the reference point."""
    reference: tuple[float, float]


def pareto_front(
    points: Mapping[str, tuple[float, float]], *, reference: tuple[float, float] | None = None
) -> Front:
    """The front of points of which both values are better if they are larger.

    Args:
        points: two values by name; a figure that is better if it is smaller is given negated.
        reference: a point that no method is worse than; default: the smallest of each value. The
            hypervolume (Zitzler and Thiele 1998) depends on it.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no points")
    least = (
        min(x for x, _ in points.values()),
        min(y for _, y in points.values()),
    ) if reference is None else reference  # fmt: skip
    ordered = sorted(points.items(), key=lambda item: (-item[1][0], -item[1][1]))
    names: list[str] = []
    area, highest = 0.0, least[1]
    for name, (x, y) in ordered:
        if names and y <= points[names[-1]][1]:
            continue
        names.append(name)
        area += max(0.0, x - least[0]) * max(0.0, y - highest)
        highest = max(highest, y)
    return Front(names=names, hypervolume=area, reference=least)
