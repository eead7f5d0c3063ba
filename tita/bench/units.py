"""Scores of a run by unit: a question, or the group of questions that are scored together.

A paired test takes units for independent, so the questions of a group are one unit.
"""

from dataclasses import dataclass

import numpy as np

from tita.bench.columns import Array, BenchmarkRun
from tita.bench.scoring import METRICS, GroupRule

_MEAN, _ALL, _MME = range(3)
_RULE_CODES = {GroupRule.MEAN: _MEAN, GroupRule.ALL: _ALL, GroupRule.MME: _MME}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitScores:
    """Scores of units, in the order of their first questions."""

    values: Array
    """From 0 to 1; nan for a unit without a score."""
    first: Array
    """Position of each unit's first question among the run's questions."""
    num_incomplete: int
    """Number of judged groups with questions that were not asked or have no answer."""


def unit_scores(run: BenchmarkRun, mask: Array, *, known: Array | None = None) -> UnitScores:
    """The score of every unit by the group rule of its metric.

    Args:
        run: the run.
        mask: which of the run's questions are taken.
        known: which questions count where a unit is the mean of its questions; by default all with
            a score. Groups that are judged as a whole always take all of their questions.
    """
    positions = np.flatnonzero(mask)
    score, metric = run.column("score")[positions], run.column("metric")[positions]
    size = run.column("group_size")[positions]
    keys = _unit_keys(run, positions)
    _, first, of_question = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first, of_question = first[order], place[of_question]
    has_score = ~np.isnan(score)
    counted = has_score if known is None else has_score & known[positions]

    def total(which: Array) -> Array:
        return np.bincount(of_question, weights=which, minlength=len(first))

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total(np.where(counted, score, 0.0)) / total(counted)  # 0 / 0 is nan
        mean_of_all = total(np.nan_to_num(score)) / total(has_score)
    is_complete = total(has_score) >= np.maximum(size[first], total(np.ones_like(score)))
    all_right = is_complete & (total(has_score & (score == 1)) >= total(has_score))
    rules = _rules(run)[metric[first]]
    values = np.select(
        [rules == _ALL, rules == _MME], [all_right, (mean_of_all + all_right) / 2], default=mean
    )
    return UnitScores(
        values=values,
        first=positions[first],
        num_incomplete=int(((rules != _MEAN) & ~is_complete).sum()),
    )


def unit_names(run: BenchmarkRun, units: UnitScores) -> list[tuple[str, str]]:
    """(metric, name of the group or id of the question) of every unit."""
    identities, metrics, groups = list(run.rows), list(run.metrics), list(run.groups)
    metric, group = run.column("metric"), run.column("group")
    return [
        (metrics[metric[n]], f"group {groups[group[n]]}" if groups[group[n]] else identities[n])
        for n in units.first
    ]


def _unit_keys(run: BenchmarkRun, positions: Array) -> Array:
    """A number per question, which the questions of one group and metric share."""
    group = run.column("group")[positions].astype(np.int64)
    metric = run.column("metric")[positions].astype(np.int64)
    without_group = group == run.groups.get("", -1)
    alone = -1 - np.arange(len(positions), dtype=np.int64)
    return np.where(without_group, alone, group * max(1, len(run.metrics)) + metric)


def _rules(run: BenchmarkRun) -> Array:
    """Code of the group rule by metric code."""
    rules = [METRICS[name].group if name in METRICS else GroupRule.MEAN for name in run.metrics]
    return np.array([_RULE_CODES[rule] for rule in rules], dtype=np.int64)
