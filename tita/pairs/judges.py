"""Judges decide which of two answers is better, if the recipe names one.

`judge` in the recipe is a built-in name, the name of an entry point in the group `tita.judges`, or
`package.module:name`. A judge is a callable, or a class that is instantiated without arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol, get_args

from tita.data.normalise import comparable
from tita.errors import TitaError
from tita.records import Question

ENTRY_POINTS = "tita.judges"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Two answers to one question that differ."""

    question: Question
    image: Path
    """The clean image."""
    chosen: str
    rejected: str


Better = Literal["chosen", "rejected", "neither"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A judge's decision on a candidate."""

    better: Better
    """The better answer; `rejected` swaps the two, and `neither` drops the candidate."""
    reason: str = ""
    """Why neither is better, in a word or two; dropped candidates are counted by reason."""


class Judge(Protocol):
    """Decides on all candidates of one batch.

    Each worker has its own judge. A judge should be deterministic: a worker that was killed repeats
    its last batch.
    """

    def __call__(self, candidates: Sequence[Candidate], /) -> Sequence[Preference]:
        """Return one preference per candidate, in their order."""
        ...


def exact_match(candidates: Sequence[Candidate]) -> list[Preference]:
    """Prefer the answer that equals a reference of the question, as `comparable` has them."""
    preferences = []
    for candidate in candidates:
        references = {comparable(reference) for reference in candidate.question.references}
        correct = comparable(candidate.chosen) in references
        if correct != (comparable(candidate.rejected) in references):
            preferences.append(Preference(better="chosen" if correct else "rejected"))
        else:
            reason = "both right" if correct else "both wrong"
            preferences.append(Preference(better="neither", reason=reason))
    return preferences


_BUILT_IN: dict[str, Judge] = {"exact-match": exact_match}


def load_judge(name: str) -> Judge:
    """Load the judge that a recipe names.

    Raises:
        TitaError: there is no such judge, or it cannot be loaded.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" in name:
        point = metadata.EntryPoint(name=name, value=name, group=ENTRY_POINTS)
    else:
        installed = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
        if name not in installed:
            raise TitaError(
                f"no judge {name!r}",
                where="judge",
                remedy=f"choose one of {', '.join([*_BUILT_IN, *installed])}, or write module:name",
            )
        point = installed[name]
    try:
        judge = point.load()
        judge = judge() if isinstance(judge, type) else judge
        if not callable(judge):
            raise TypeError("it is not callable")
        return judge  # type: ignore[no-any-return]
    except (ImportError, AttributeError, TypeError) as error:
        raise TitaError(
            f"cannot load the judge {point.value!r} ({error})",
            where="judge",
            remedy="install its package where the job runs",
        ) from None


def apply_judge(
    judge: Judge, candidates: Sequence[Candidate], *, name: str
) -> Sequence[Preference]:
    """Return the judge's preferences, one per candidate.

    Raises:
        TitaError: the judge returns anything else.
    """
    preferences = list(judge(candidates)) if candidates else []
    where, remedy = f"judge {name}", "return one tita.pairs.judges.Preference per candidate"
    if len(preferences) != len(candidates):
        what = f"{len(preferences)} preferences for {len(candidates)} candidates"
        raise TitaError(what, where=where, remedy=remedy)
    if not all(isinstance(preference, Preference) for preference in preferences):
        raise TitaError("a result that is not a Preference", where=where, remedy=remedy)
    for preference in preferences:
        if preference.better not in get_args(Better):
            raise TitaError(
                f"a preference of {preference.better!r}",
                where=where,
                remedy=f"set `better` to one of {', '.join(get_args(Better))}",
            )
    return preferences
