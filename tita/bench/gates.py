"""The gates of the benchmark job: against weight 0, and against the last good report."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tita.bench.archive import fetch, good_reports
from tita.bench.columns import BenchmarkRun
from tita.bench.compare import check_gates, compare
from tita.bench.evaluate import SAMPLE_SUITE, read_runs
from tita.errors import TitaError
from tita.recipes import BenchmarkRecipe
from tita.storage import Store

_MAX_REPORTS = 20
"""Maximum number of earlier reports that are read to find one of the same protocol."""


@dataclass(slots=True)
class GateResults:
    """The gates that were missed, and those that could not be checked, in words."""

    missed: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check_all_gates(
    recipe: BenchmarkRecipe, runs: Sequence[BenchmarkRun], *, store: Store
) -> GateResults:
    """Check the gates of the recipe on the runs of one report."""
    results = GateResults()
    _check_against_base(recipe, runs, results)
    if recipe.fail_below is not None or recipe.fail_slower is not None:
        for run in runs:
            _check_against_last_good(recipe, run, results, store=store)
    return results


def _check_against_base(
    recipe: BenchmarkRecipe, runs: Sequence[BenchmarkRun], results: GateResults
) -> None:
    """Compare each weight above 0 with weight 0 of the same suite."""
    if recipe.fail_below_base is None:
        return
    is_default = "fail_below_base" not in recipe.model_fields_set
    for run in runs:
        if not (run.protocol["weight"] or run.protocol["weights"]):
            continue
        if is_default and run.protocol["suite"] == SAMPLE_SUITE:
            results.unchecked.append(
                f"{run.title} against weight 0: the sample questions prove nothing"
            )
            continue
        wanted = {**run.protocol, "weight": 0, "weights": None}
        base = next((other for other in runs if other.protocol == wanted), None)
        if base is None:
            results.unchecked.append(f"{run.title} against weight 0: it was not measured")
            continue
        summary = compare(base, run).summary
        if is_default and summary["overall"] is None:
            results.unchecked.append(f"{run.title} against weight 0: no question is scored")
            continue
        texts = check_gates(
            summary, fail_below=recipe.fail_below_base, fail_slower=None,
            max_missing=recipe.max_missing,
        )  # fmt: skip
        results.missed += [f"{run.title} against weight 0: {text}" for text in texts]


def _check_against_last_good(
    recipe: BenchmarkRecipe, run: BenchmarkRun, results: GateResults, *, store: Store
) -> None:
    """Compare a run with the run of the same protocol in the last good report that has one."""
    found = next(_earlier_runs(run, store=store), None)
    if found is None:
        results.unchecked.append(
            f"{run.title}: there is no good report on the same questions to compare with"
        )
        return
    entry, before = found
    summary, fail_slower = compare(before, run).summary, recipe.fail_slower
    if fail_slower is not None and summary["loads_differ"]:
        # A changed load is no fault of the model. The next run is compared with this one.
        results.unchecked.append(
            f"{run.title} against {entry['id']}: fail_slower, because the times are of different "
            f"loads: {summary['loads_differ']}"
        )
        fail_slower = None
    texts = check_gates(
        summary, fail_below=recipe.fail_below, fail_slower=fail_slower,
        max_missing=recipe.max_missing,
    )  # fmt: skip
    results.missed += [f"{run.title} against {entry['id']}: {text}" for text in texts]


def _earlier_runs(
    run: BenchmarkRun, *, store: Store
) -> Iterator[tuple[dict[str, Any], BenchmarkRun]]:
    """Runs of the same protocol in good reports, newest first."""
    digest = run.protocol["questions_sha256"]
    for entry in islice(good_reports(store, questions_sha256=digest), _MAX_REPORTS):
        files = {each["file"] for each in entry["runs"] if each["title"] == run.title}
        if not files:
            continue
        try:
            folder = fetch(entry, store=store)
            earlier = [old for name in sorted(files) for old in read_runs(folder / name)]
        except TitaError:
            continue  # deleted, or of an older format
        for old in earlier:
            if dict(old.protocol) == dict(run.protocol):
                yield entry, old
