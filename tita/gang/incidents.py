"""Counts what went wrong with a gang: one incident is one try, however many of its nodes failed.

The gang counts from its record in the store (`tita.gang.attempts`), the launcher from the pods.
Both use the functions of this module, so that their counts agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tita.errors import ABORTED, UNCOUNTED


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnd:
    """One attempt of one node, which failed."""

    node: int
    started: float
    """Seconds since 1970."""
    ended: float
    code: int | None
    """Its exit code; None if the node was lost, drained or preempted."""


@dataclass(slots=True)
class Incident:
    """Failures of nodes that ran at the same time."""

    began: float
    ends: list[NodeEnd] = field(default_factory=list)

    @property
    def is_try(self) -> bool:
        """Whether it counts against the gang's tries.

        A lost node is nobody's fault; its peers notice (`LOST_PEER`), or NCCL aborts them (134).
        Without a lost node, an abort is a fault of the gang.
        """
        codes = {end.code for end in self.ends}
        if codes - UNCOUNTED - {ABORTED, None}:
            return True
        return ABORTED in codes and None not in codes


def find_incidents(ends: Iterable[NodeEnd]) -> list[Incident]:
    """Group failures into incidents, oldest first.

    A node that had started when an incident began failed because of it. One that started later
    belongs to the next attempt.
    """
    found: list[Incident] = []
    for end in sorted(ends, key=lambda end: end.ended):
        incident = next((one for one in found if one.began > end.started), None)
        if incident is None:
            incident = Incident(end.ended)
            found.append(incident)
        incident.ends.append(end)
    return found


def count_tries(ends: Iterable[NodeEnd]) -> int:
    """Number of incidents that count against the gang's tries."""
    return sum(incident.is_try for incident in find_incidents(ends))
