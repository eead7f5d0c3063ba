"""`tita-bench eval`: statistics and scores of the runs in a folder of results files."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import tita
from tita.bench.columns import NO, YES, Array, BenchmarkRun, ReferenceQuestions, read_columns
from tita.bench.judge import judgement_files, read_judgements
from tita.bench.load_figures import TIMES, load_figures, name_runs
from tita.bench.metrics import mme_scores, pope_scores
from tita.bench.questions import read_items
from tita.bench.registry import ModelRegistry
from tita.bench.results_file import find_results_files, read_results
from tita.bench.scoring import METRICS, SUITE_METRICS
from tita.bench.units import unit_scores
from tita.errors import TitaError
from tita.storage.manifest import sha256_of
from tita.terminal import progress

FORMAT = 1
SAMPLE_SUITE = "sample"
"""Suite of the questions that `tita-bench sample` writes."""
_MME_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The runs of a folder, and the content of `report.json`."""

    runs: Sequence[BenchmarkRun]
    report: Mapping[str, Any]
    judgements: Sequence[Path] = ()
    """Files of judges that the scores were read from."""


def evaluate(
    folder: Path,
    *,
    registry: ModelRegistry | None = None,
    goodput: Mapping[str, float] | None = None,
) -> Evaluation:
    """Read and summarise every results file in a folder.

    Args:
        registry: has the prices of models whose results have none.
        goodput: limits in seconds by name; default: those that each run recorded.

    Raises:
        TitaError: the folder has no results files, or one has two judges.
    """
    paths = find_results_files(folder)
    judged_by = _judgements_by_name(paths, folder=folder)
    paths = [path for path in paths if path not in judged_by.values()]
    if not paths:
        raise TitaError(
            "no results files", where=str(folder), remedy="create one with `tita-bench run`"
        )
    references = _find_references(folder, paths)
    runs: list[BenchmarkRun] = []
    size_bytes = sum(path.stat().st_size for path in paths)
    with progress("reading results", total=size_bytes, unit="bytes") as advance:
        for path in paths:
            judge_file = judged_by.get(path.name)
            runs += read_columns(
                path,
                references=references,
                judgements=read_judgements(judge_file) if judge_file else None,
                prices=_prices_by_name(registry),
                advance=advance,
            )
    runs.sort(key=_sort_key)
    name_runs(runs)
    used = [judged_by[path.name] for path in paths if path.name in judged_by]
    return Evaluation(
        runs=runs,
        report=_build_report(runs, goodput=goodput),
        judgements=[file for path in used for file in judgement_files(path)],
    )


def _judgements_by_name(paths: Sequence[Path], *, folder: Path) -> dict[str, Path]:
    """The judge's file by the name of the results file that it judges."""
    judged_by: dict[str, Path] = {}
    for path in paths:
        name = _first_record(path).get("judges")
        if name in judged_by:
            raise TitaError(
                f"{judged_by[name].name} and {path.name} both judge {name}",
                where=str(folder),
                remedy="keep one of them in the folder",
            )
        if name is not None:
            judged_by[name] = path
    return judged_by


def _sort_key(run: BenchmarkRun) -> tuple[str, str, float, str]:
    protocol = run.protocol
    weight = -1.0 if run.total_weight is None else run.total_weight
    return str(protocol["suite"] or ""), str(protocol["model_name"]), weight, run.path.name


def _build_report(
    runs: Sequence[BenchmarkRun], *, goodput: Mapping[str, float] | None
) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "format": FORMAT,
        # Ids sort by time, so that the newest reports of a store are found without reading all.
        "id": f"{now:%Y%m%d}-{now:%H%M%S%f}"[:-3] + f"-{uuid.uuid4().hex[:4]}",
        "created": now.isoformat(timespec="microseconds"),
        "tita": tita.__version__,
        "notes": _notes(runs),
        "runs": [summarise(run, goodput=goodput) for run in runs],
    }


def _notes(runs: Sequence[BenchmarkRun]) -> list[str]:
    notes = []
    if any(set(run.metrics) & set(SUITE_METRICS) for run in runs):
        notes.append(
            "Captions are not scored here: their figures need the words of the whole set. Give "
            "`tita-bench suite` or `tita-bench sweep --methods`."
        )
    if any(run.protocol["suite"] == SAMPLE_SUITE for run in runs):
        notes.append(
            "The sample questions show that the model answers. Their scores prove nothing: they "
            "are few and easy. Give questions of your own, or a published suite."
        )
    return notes


def score_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores grouped by protocol: one table contains comparable scores only.

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


def read_runs(path: Path) -> list[BenchmarkRun]:
    """The runs of one results file, with the judgements in `<file>.judged.jsonl`.

    Raises:
        TitaError: the file does not exist or has no results.
    """
    if not path.is_file():
        raise TitaError("no such results file", where=str(path), remedy="check the path")
    judged = path.with_name(f"{path.stem}.judged.jsonl")
    runs = read_columns(path, judgements=read_judgements(judged) if judged.is_file() else None)
    if not runs:
        raise TitaError("the file has no results", where=str(path))
    return runs


def _first_record(path: Path) -> dict[str, Any]:
    return next(read_results(path), {})


def _prices_by_name(registry: ModelRegistry | None) -> dict[str, Mapping[str, Any]]:
    if registry is None:
        return {}
    priced = {name: model for name, model in registry.models.items() if model.price is not None}
    names = {**priced, **{model.id: model for model in priced.values()}}
    return {name: model.price.model_dump() for name, model in names.items() if model.price}


def _find_references(folder: Path, paths: Sequence[Path]) -> ReferenceQuestions | None:
    """The question file of older results files, which contain no references."""
    if all("questions_sha256" in _first_record(path) for path in paths):
        return None
    for path in sorted(folder.glob("*.jsonl")):
        if path in paths or path.name.startswith("."):
            continue
        try:
            items = {item.id: item for item in read_items(path)}
        except TitaError:
            continue
        if any(item.references for item in items.values()):
            return ReferenceQuestions(items=items, sha256=sha256_of(path))
    return None


def summarise(run: BenchmarkRun, *, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Statistics of one run as plain values; None where nothing is known.

    A run that was measured under several loads has times by load only.

    Args:
        goodput: limits in seconds by name; default: those that the run recorded.
    """
    loads = load_figures(run, goodput=goodput)
    error = run.column("error")
    answered = error < 0
    num_questions, num_answered = run.num_questions, int(answered.sum())
    has_image = run.column("has_image")
    tokens = {}
    for name in ("input_tokens", "output_tokens"):
        known = _known(run.column(name)[answered])
        tokens[name] = int(known.sum()) if len(known) else None
    cost, costs = None, _known(run.column("cost"))
    if run.currency is not None and len(costs):
        cost = {
            "amount": float(costs.sum()), "currency": run.currency, "num_questions": len(costs),
        }  # fmt: skip
    return {
        "title": run.title,
        "name": run.name,
        "file": run.path.name,
        **run.protocol,
        "links": run.links,
        "num_questions": num_questions,
        "num_answered": num_answered,
        "num_failed": len(run.rows) - num_answered,
        "num_not_asked": num_questions - len(run.rows),
        "num_with_image": int((has_image == 1).sum()),
        "num_without_image": int((has_image == 0).sum()),
        "num_hidden_options": int(run.column("hides_options").sum()),
        "success_rate": num_answered / num_questions,
        "loads": loads,
        **{name: loads[0][name] if len(loads) == 1 else None for name in TIMES},
        **tokens,
        "tokens_changed": run.num_tokens_changed,
        "cost": cost,
        "outcomes": {
            name: int(np.count_nonzero(run.column("outcome") == number))
            for number, name in enumerate(run.outcomes)
        },
        "errors": {
            name: int(np.count_nonzero(error == number)) for number, name in enumerate(run.errors)
        },
        "error_messages": run.error_messages,
        "scores": _scores(run),
    }


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _scores(run: BenchmarkRun) -> list[dict[str, Any]]:
    """One entry per metric, with its protocol and its scores by category."""
    score, metric, category = run.column("score"), run.column("metric"), run.column("category")
    entries = []
    for number, name in enumerate(run.metrics):
        mine = metric == number
        scored = mine & ~np.isnan(score)
        if not name or not scored.any():
            continue
        by_category = {
            kind: _score_values(run, name, rows)
            for kind, rows in _category_masks(run, mine, category).items()
            if (rows & scored).any()
        }
        values = _score_values(run, name, mine)
        if name == "mme":
            values |= _mme_totals(by_category)
        entries.append(
            {
                "metric": name,
                "values": values,
                "by_category": by_category,
                "num_scored": int(scored.sum()),
                "protocol": _score_protocol(run, name, num_questions=int(mine.sum())),
            }
        )
    return entries


def _category_masks(run: BenchmarkRun, rows: Array, category: Array) -> dict[str, Array]:
    """Row masks by category; for MM-Vet's `ocr+math` also by each single capability."""
    codes: dict[str, list[int]] = {}
    for code, kind in enumerate(run.categories):
        for name in dict.fromkeys((kind, *kind.split("+"))):
            codes.setdefault(name, []).append(code)
    masks = {name: rows & np.isin(category, own) for name, own in sorted(codes.items()) if name}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _mme_totals(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """MME's totals are sums over tasks, not means over questions."""
    cognition = sum(tasks[name]["score"] for name in tasks if name in _MME_COGNITION)
    total = sum(task["score"] for task in tasks.values())
    return {"score": total, "perception": total - cognition, "cognition": cognition}


def _score_protocol(run: BenchmarkRun, metric: str, *, num_questions: int) -> dict[str, Any]:
    judge = run.judge if metric not in METRICS else None
    rule = f"judged by {judge['model']}" if judge else METRICS[metric].rule
    return {
        "suite": run.protocol["suite"],
        "metric": metric,
        "num_questions": num_questions,
        "rule": rule,
        "judge_prompt": judge["prompt"] if judge else None,
        "prompt": run.prompt_endings.get(metric) or "as in the question file",
        "questions_sha256": run.protocol["questions_sha256"],
        "max_new_tokens": run.protocol["max_new_tokens"],
        "temperature": run.protocol["temperature"],
        "model": run.protocol["model_name"],
        "weight": run.protocol["weight"],
    }


def comparable(protocol: dict[str, Any]) -> tuple[Any, ...]:
    """The fields that comparable scores share: all except model and weight."""
    return tuple(value for key, value in protocol.items() if key not in ("model", "weight"))


def _score_values(run: BenchmarkRun, metric: str, asked: Array) -> dict[str, Any]:
    """Scores in percent (MME's in its own points) of the questions in the mask `asked`.

    A question without an answer has no score, and a group with one is not right.
    """
    rows = asked & ~np.isnan(run.column("score"))
    score, parsed = run.column("score")[rows], run.column("parsed")[rows]
    values: dict[str, Any] = {"score": 100 * float(score.mean())}
    if metric in METRICS and METRICS[metric].parses:
        values["unparsed"] = int((parsed == 0).sum())
    if metric in ("yes-no", "pope"):
        answers: list[bool | None] = [{YES: True, NO: False}.get(code) for code in parsed.tolist()]
        pope = pope_scores(answers, (run.column("label")[rows] == YES).tolist())
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            value = getattr(pope, name)
            values[name] = None if value is None else 100 * value
    elif metric == "judge-llava-bench":
        # LLaVA-Bench's relative score (arXiv 2304.08485): sum of answers over sum of references.
        references = float(run.column("reference_score")[rows].sum())
        values = {"score": 100 * (float(score.sum()) / references) if references else 0.0}
    elif metric in ("mme", "circular"):
        units = unit_scores(run, asked)
        if metric == "mme":
            groups = map(str, run.column("group")[asked].tolist())
            right = [None if np.isnan(s) else bool(s) for s in run.column("score")[asked]]
            values |= mme_scores(zip(groups, right, strict=True))
        else:
            values["vanilla"] = values["score"]
            values["score"] = 100 * float(units.values.mean())
        values["groups"] = len(units.values)
        values["incomplete groups"] = units.num_incomplete
    return values
