"""Judges: what has the last word on which of two answers is better, if a recipe names one.

`judge` in the recipe is the name of a judge that is known here, of an entry point in the group
`tita.judges`, or the place of one as `package.module:name`. A judge is a callable, or a class that
makes one without arguments; see `Judge`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

from tita.data.normalise import normalise
from tita.errors import TitaError
from tita.records import Question

ENTRY_POINTS = "tita.judges"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Two answers to one question that do not agree."""

    question: Question
    image: Path
    """The clean image."""
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Which of a candidate's answers is the better one."""

    better: Literal["chosen", "rejected", "neither"]
    """`rejected` has the two change places; with `neither` no pair is made."""
    reason: str = ""
    """Why neither is, in a word or two: dropped candidates are counted by it."""


class Judge(Protocol):
    """Decides on all candidates of one batch at once.

    Workers do not share a judge. It should decide alike when it is asked again: a worker that was
    killed does its last batch anew.
    """

    def __call__(self, candidates: Sequence[Candidate], /) -> Sequence[Verdict]:
        """One verdict a candidate, in their order."""
        ...


def exact_match(candidates: Sequence[Candidate]) -> list[Verdict]:
    """The better answer is the one that the question's references have; `normalise` applies."""
    return [_matched(candidate) for candidate in candidates]


def _matched(candidate: Candidate) -> Verdict:
    known = {normalise(reference) for reference in candidate.question.references}
    right = normalise(candidate.chosen) in known, normalise(candidate.rejected) in known
    if right[0] == right[1]:
        return Verdict(better="neither", reason="both right" if right[0] else "both wrong")
    return Verdict(better="chosen" if right[0] else "rejected")


_KNOWN: dict[str, Judge] = {"exact-match": exact_match}


def load_judge(name: str) -> Judge:
    """The judge that a recipe calls `name`.

    Raises:
        TitaError: there is none, or it cannot be loaded; says which names there are.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if ":" in name:
        found = metadata.EntryPoint(name=name, value=name, group=ENTRY_POINTS)
    else:
        offered = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
        if name not in offered:
            raise TitaError(
                f"no judge {name!r}",
                where="judge",
                remedy=f"choose one of {', '.join([*_KNOWN, *offered])}, or write module:name",
            )
        found = offered[name]
    try:
        judge = found.load()
        judge = judge() if isinstance(judge, type) else judge
        if not callable(judge):
            raise TypeError("it cannot be called")
        return judge  # type: ignore[no-any-return]
    except (ImportError, AttributeError, TypeError) as error:
        raise TitaError(
            f"no judge at {found.value!r} ({error})",
            where="judge",
            remedy="install its package where the job runs",
        ) from None


def judged(judge: Judge, candidates: Sequence[Candidate], *, name: str) -> Sequence[Verdict]:
    """The judge's verdicts, one a candidate.

    Raises:
        TitaError: it gave something else.
    """
    verdicts = list(judge(candidates)) if candidates else []
    if len(verdicts) != len(candidates) or not all(isinstance(v, Verdict) for v in verdicts):
        raise TitaError(
            f"{len(verdicts)} verdicts on {len(candidates)} candidates"
            if len(verdicts) != len(candidates)
            else "something else than verdicts",
            where=f"judge {name}",
            remedy="return one tita.pairs.judges.Verdict a candidate",
        )
    return verdicts
