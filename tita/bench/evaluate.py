"""`tita-bench eval`: all results files of a folder, and one report on them."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tita
from tita.bench.columns import References, Run, read_columns
from tita.bench.items import digest_of, read_items
from tita.bench.judge import read_judgements
from tita.bench.registry import Registry
from tita.bench.results import read_results, results_files
from tita.bench.summary import comparable, summarise
from tita.errors import TitaError
from tita.terminal import progress

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The runs of a folder and what a report says about them."""

    runs: Sequence[Run]
    report: Mapping[str, Any]


def evaluate(folder: Path, *, registry: Registry | None = None) -> Evaluation:
    """Read every results file in `folder` and summarise each run in it.

    Raises:
        TitaError: there are no results in it.
    """
    paths = results_files(folder)
    judged_by = {first["judges"]: path for path in paths if "judges" in (first := _first(path))}
    paths = [path for path in paths if path not in judged_by.values()]
    if not paths:
        raise TitaError(
            "no results files in it", where=str(folder), remedy="write one with `tita-bench run`"
        )
    references = _references(folder, paths)
    runs: list[Run] = []
    size_bytes = sum(path.stat().st_size for path in paths)
    with progress("reading results", total=size_bytes, unit="bytes") as advance:
        for path in paths:
            judge_file = judged_by.get(path.name)
            runs += read_columns(
                path,
                references=references,
                judgements=read_judgements(judge_file) if judge_file else None,
                prices=_prices(registry),
                advance=advance,
            )
    runs.sort(key=_order)
    return Evaluation(runs=runs, report=_report(runs))


def _order(run: Run) -> tuple[str, str, float, str]:
    protocol = run.protocol
    weight = -1.0 if protocol["weight"] is None else float(protocol["weight"])
    return str(protocol["suite"] or ""), str(protocol["model_name"]), weight, run.path.name


def _report(runs: Sequence[Run]) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "format": FORMAT,
        # Ids sort by time, so that the newest reports of a store are found without reading all.
        "id": f"{now:%Y%m%d}-{now:%H%M%S%f}"[:-3] + f"-{uuid.uuid4().hex[:4]}",
        "created": now.isoformat(timespec="microseconds"),
        "tita": tita.__version__,
        "runs": [summarise(run) for run in runs],
    }


def score_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores grouped by protocol: only what is comparable stands in one table.

    Returns:
        a list of {"protocol", "rows"}; a row is {"run", "values", "by_category", "num_scored"}.
    """
    tables: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in report["runs"]:
        for score in run["scores"]:
            key = comparable(score["protocol"])
            table = tables.setdefault(key, {"protocol": score["protocol"], "rows": []})
            table["rows"].append({"run": run, **score})
    return list(tables.values())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _first(path: Path) -> dict[str, Any]:
    return next(read_results(path), {})


def _prices(registry: Registry | None) -> dict[str, Mapping[str, Any]]:
    if registry is None:
        return {}
    priced = {name: model for name, model in registry.models.items() if model.price is not None}
    names = {**priced, **{model.id: model for model in priced.values()}}
    return {name: model.price.model_dump() for name, model in names.items() if model.price}


def _references(folder: Path, paths: Sequence[Path]) -> References | None:
    """Questions beside older results, which carry no references of their own."""
    if all("questions_sha256" in _first(path) for path in paths):
        return None
    for path in sorted(folder.glob("*.jsonl")):
        if path in paths or path.name.startswith("."):
            continue
        try:
            items = {item.id: item for item in read_items(path)}
        except TitaError:
            continue
        if any(item.references for item in items.values()):
            return References(items=items, sha256=digest_of(path))
    return None
