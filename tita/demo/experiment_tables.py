"""Tables of the experiments, as Markdown and JSON: every method by cost, score and comparison."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tita.bench.significance import holm
from tita.demo.comparison import SeedsComparison, compare_over_seeds
from tita.demo.seeds import TaskOutcome
from tita.json_text import dump_json
from tita.storage.directory import DirectoryStore
from tita.terminal import say

LOW_COST, HIGH_COST = 1.2, 2.3
"""Costs, in times the base, within which a method is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """All comparisons of one task; their p-values are corrected together."""

    against_base: dict[str, SeedsComparison]
    """By method."""
    against_vcd: dict[str, SeedsComparison]
    controls: dict[tuple[str, str], SeedsComparison]
    """By method and control: against the base, or against VCD for what has contrast."""
    corrected: dict[tuple[str, str], float]
    """Holm's p-value of each, by name of the method (and control) and of its baseline."""


def compare_methods(outcome: TaskOutcome) -> Comparisons:
    """Compare every method with the base and with VCD, and every control with its baseline."""
    methods = {method.name: method for method in outcome.methods}

    def against(baseline: str, name: str, scores: Any) -> SeedsComparison:
        return compare_over_seeds(
            (baseline, methods[baseline].scores), (name, scores), images=outcome.images
        )

    others = [name for name in methods if name != "base"]
    base = {name: against("base", name, methods[name].scores) for name in others}
    vcd = {name: against("vcd", name, methods[name].scores) for name in others if name != "vcd"}
    controls = {
        (name, control): against(method.baseline, f"{name}, {control}", scores)
        for name, method in methods.items()
        for control, scores in method.controls.items()
    }
    everything = [*base.values(), *vcd.values(), *controls.values()]
    corrected = holm([each.p_value for each in everything])
    return Comparisons(
        against_base=base,
        against_vcd=vcd,
        controls=controls,
        corrected={(each.b, each.a): p for each, p in zip(everything, corrected, strict=True)},
    )


def criteria(outcome: TaskOutcome, compared: Comparisons) -> list[str]:
    """The two claims on cost, in words, as they were seen."""
    found = []
    for bound, points, text in (
        (LOW_COST, -1, "within one point of"),
        (HIGH_COST, 1, "one point over"),
    ):
        rewarded = [
            method for method in outcome.methods
            if method.controls and method.times_base <= bound
        ]  # fmt: skip
        if not rewarded:
            found.append(f"At most {bound:g} times the base: no method with a reward model.")
            continue
        # Validation chooses between them.
        best = max(rewarded, key=lambda method: float(np.mean(method.validation)))
        against = compared.against_vcd[best.name]
        met = 100 * against.difference >= points
        sure = 100 * against.low >= points
        found.append(
            f"At most {bound:g} times the base: {best.name} ({best.times_base:.2f}) is "
            f"{_points(against)} to VCD; {text} VCD: {'yes' if met else 'NO'}"
            f"{', by the whole interval' if sure else ''}."
        )
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, with the least and the greatest of several."""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def table(outcome: TaskOutcome, compared: Comparisons) -> list[dict[str, str]]:
    """One row per method."""
    rows = []
    for method in outcome.methods:
        means = 100 * method.scores.mean(1)
        base, vcd = (
            side.get(method.name) for side in (compared.against_base, compared.against_vcd)
        )
        row = {
            "method": method.name,
            "passes": method.passes,
            "time": f"{method.times_base:.2f}",
            outcome.task.unit: mean_and_spread(means.tolist()),
            "to the base": _points(base) if base else "",
            "p, Holm": f"{compared.corrected[method.name, 'base']:.2g}" if base else "",
            "to VCD": _points(vcd) if vcd and method.name != "base" else "",
        }
        for control in ("other images", "no DPO"):
            found = compared.controls.get((method.name, control))
            row[control] = _points(found) if found else ""
        rows.append(row)
    return rows


def details_table(outcome: TaskOutcome) -> list[dict[str, str]]:
    """The task's further figures, one row per method."""
    return [
        {"method": method.name}
        | {name: "" if value is None else f"{value:.1f}" for name, value in method.details.items()}
        for method in outcome.methods
    ]


def settings_table(outcome: TaskOutcome) -> list[dict[str, str]]:
    """What validation chose, one row per method."""
    return [
        {
            "method": method.name,
            "chosen": "; ".join(dict.fromkeys(method.settings)),
            "on validation": ", ".join(f"{100 * each:.1f}" for each in method.validation),
        }
        for method in outcome.methods
    ]


def write_tables(outcome: TaskOutcome, *, out: Path) -> None:
    """Write `<task>.md` and `<task>.json`."""
    compared = compare_methods(outcome)
    counts = ", ".join(f"{number} {name}" for name, number in outcome.num_pairs.items())
    head = (
        f"## {outcome.task.title}\n\n{len(outcome.seeds)} seeds of training, "
        f"{outcome.num_validation} questions to choose settings with, "
        f"{len(outcome.images)} test questions about {len(set(outcome.images))} images; "
        f"{counts}; r = {outcome.size_ratio:.2f}."
    )
    tables = (table(outcome, compared), details_table(outcome), settings_table(outcome))
    words = criteria(outcome, compared)
    parts = [head, *map(markdown, tables), "\n".join(f"- {each}" for each in words)]
    kinds = dict.fromkeys(outcome.kinds)
    for kind in kinds if len(kinds) > 1 else ():
        own = outcome.of_kind(kind)
        parts += [f"### Kind {kind} alone: {len(own.images)} questions"]
        parts += [markdown(table(own, compare_methods(own)))]
    store = DirectoryStore(out)
    store.put(f"{outcome.task.name}.md", ("\n\n".join(parts) + "\n").encode())
    body = dump_json(_as_json(outcome, compared, words), indent=2)
    store.put(f"{outcome.task.name}.json", body.encode())
    say(f"experiments: {len(outcome.seeds)} seeds in {out / outcome.task.name}.md")


def num_seeds(out: Path, task: str) -> int:
    """The number of seeds in the tables of a task; 0 if there are none."""
    path = out / f"{task}.json"
    return len(json.loads(path.read_text())["seeds"]) if path.is_file() else 0


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows as a table of Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _points(compared: SeedsComparison) -> str:
    points = (100 * each for each in (compared.difference, compared.low, compared.high))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)


def _as_json(outcome: TaskOutcome, compared: Comparisons, words: Sequence[str]) -> dict[str, Any]:
    comparisons = [
        *compared.against_base.values(),
        *compared.against_vcd.values(),
        *compared.controls.values(),
    ]
    return {
        "task": outcome.task.name,
        "seeds": list(outcome.seeds),
        "num_questions": len(outcome.images),
        "num_pairs": dict(outcome.num_pairs),
        "size_ratio": outcome.size_ratio,
        "methods": [
            {
                "name": method.name,
                "passes": method.passes,
                "times_base": method.times_base,
                "settings": list(method.settings),
                "validation": list(method.validation),
                "by_seed": method.scores.mean(1).tolist(),
                "details": dict(method.details),
            }
            for method in outcome.methods
        ],
        "comparisons": [
            {
                "a": each.a,
                "b": each.b,
                "difference": each.difference,
                "low": each.low,
                "high": each.high,
                "p_value": each.p_value,
                "p_holm": compared.corrected[each.b, each.a],
                "by_seed": list(each.by_seed),
            }
            for each in comparisons
        ],
        "criteria": list(words),
    }
