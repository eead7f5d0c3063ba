"""Publishes a benchmark report: its files, results and questions in the store, an index entry."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tita.bench.archive import INDEX, REPORT_FILES, REPORTS, read_index
from tita.bench.benchmark_report import write_report
from tita.bench.evaluate import Evaluation, comparable
from tita.bench.questions import QUESTION_SUFFIXES
from tita.json_text import dump_json
from tita.settings import settings
from tita.storage import Store
from tita.storage.manifest import sha256_of

_NUM_HISTORY = 60
"""Maximum number of earlier reports in the history plot."""


def publish(
    evaluation: Evaluation,
    *,
    folder: Path,
    images: Path,
    store: Store,
    out: Path | None = None,
    good: bool | None = None,
    job: str | None = None,
) -> dict[str, Any]:
    """Write a report with its history, push it with its results and questions, and index it.

    Args:
        folder: folder of the results files.
        images: folder that image paths are relative to.
        out: folder to write the report to; default: `folder`.
        good: whether the report passed its gates; None without gates.
        job: run id of the job that made the report.

    Returns:
        The index entry.
    """
    report = evaluation.report
    entry = _entry(report, good=good, job=job)
    written, earlier = out or folder, read_index(store, limit=_NUM_HISTORY)
    write_report(evaluation, folder=written, images=images, history=[*earlier, entry])
    with tempfile.TemporaryDirectory(dir=settings().scratch_dir) as scratch:
        stage = Path(scratch) / str(report["id"])
        stage.mkdir()
        results = {run.path for run in evaluation.runs} | set(evaluation.judgements)
        for path in results | _questions(report, folder):
            shutil.copy2(path, stage)
        for name in REPORT_FILES:
            shutil.copy2(written / name, stage)
        meta = {"kind": "report", "id": report["id"], "points_to": entry["points_to"]}
        manifest = store.push_tree(stage, f"{REPORTS}/{report['id']}", meta=meta)
    entry["digest"] = manifest.digest
    store.put(f"{INDEX}/{report['id']}.json", dump_json(entry, indent=2).encode())
    return entry


def _entry(report: Mapping[str, Any], *, good: bool | None, job: str | None) -> dict[str, Any]:
    runs = report["runs"]
    return {
        "id": report["id"],
        "created": report["created"],
        "good": good,
        "job": job,
        "notes": list(report["notes"]),
        "points_to": _points_to(report),
        "runs": [
            {
                "title": run["title"],
                "model": run["model_name"],
                **{key: run[key] for key in ("weight", "file", "num_questions", "success_rate")},
                "response_time_p95": run["response_time"] and run["response_time"]["p95"],
            }
            for run in runs
        ],
        "scores": [
            {
                "title": run["title"],
                "suite": run["suite"] or "",
                "metric": score["metric"],
                "score": score["values"]["score"],
                "protocol": _protocol_digest(score["protocol"]),
            }
            for run in runs
            for score in run["scores"]
        ],
    }


def _points_to(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Questions, checkpoints and training runs of a report, by digest or name."""
    found: dict[str, set[str]] = {}
    for run in report["runs"]:
        pointers = {"questions_sha256": run["questions_sha256"], **run["links"]}
        for name, value in pointers.items():
            if value:
                found.setdefault(name, set()).add(str(value))
    return {name: sorted(values) for name, values in sorted(found.items())}


def _protocol_digest(protocol: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(comparable(protocol)).encode()).hexdigest()[:16]


def _questions(report: Mapping[str, Any], folder: Path) -> set[Path]:
    """The question files of the results, found in `folder` by digest."""
    wanted = {run["questions_sha256"] for run in report["runs"]} - {None}
    files = (path for path in folder.iterdir() if path.suffix in QUESTION_SUFFIXES)
    return {path for path in files if wanted and path.is_file() and sha256_of(path) in wanted}
