"""Reports in the store: `reports/<date>-<id>/` and one index entry for each.

The index is a folder of small files, one a report, written after the report is complete: two jobs
that publish at once never overwrite each other's entry, and listing reads no report.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.bench.benchmark_report import write_report
from tita.bench.evaluate import Evaluation, comparable
from tita.bench.questions import ENDINGS, digest_of
from tita.errors import TitaError
from tita.settings import settings
from tita.storage import Store

REPORTS = "reports"
_INDEX = f"{REPORTS}/index"
_HISTORY = 60
"""Reports that a history plot goes back."""
_PAGES = ("report.json", "report.html", "benchmark_report.txt")


def publish(
    evaluation: Evaluation,
    *,
    folder: Path,
    images: Path,
    store: Store,
    out: Path | None = None,
    good: bool | None = None,
) -> dict[str, Any]:
    """Write the report with its history, push it with results and questions, and index it.

    Args:
        folder: where the results files lie.
        out: where the report is written; into `folder` if not given.
        good: whether the report passed its gates, if it had any.

    Returns:
        the index entry.
    """
    report = evaluation.report
    entry = _entry(report, good=good)
    written, earlier = out or folder, read_index(store, limit=_HISTORY)
    write_report(evaluation, folder=written, images=images, history=[*earlier, entry])
    with tempfile.TemporaryDirectory(dir=settings().scratch_dir) as scratch:
        stage = Path(scratch) / str(report["id"])
        stage.mkdir()
        for path in {run.path for run in evaluation.runs} | _questions(report, folder):
            shutil.copy2(path, stage)
        for name in _PAGES:
            shutil.copy2(written / name, stage)
        meta = {"kind": "report", "id": report["id"], "points_to": entry["points_to"]}
        manifest = store.push_tree(stage, f"{REPORTS}/{report['id']}", meta=meta)
    entry["digest"] = manifest.digest
    store.put(f"{_INDEX}/{report['id']}.json", json.dumps(entry, indent=2).encode())
    return entry


def read_index(
    store: Store, *, about: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Index entries, oldest first.

    Args:
        about: only reports that point at this: a model, checkpoint, run, or digest, or its start.
        limit: only the newest so many.
    """
    newest = (e for e in _newest_first(store) if about is None or _is_about(e, about))
    return list(itertools.islice(newest, limit))[::-1]


def _newest_first(store: Store, *, start: str = "") -> Iterator[dict[str, Any]]:
    """Index entries whose ids begin with `start`; ones that cannot be read are left out."""
    keys = [info.key for info in store.list(f"{_INDEX}/{start}")]
    for key in sorted(keys, reverse=True):
        try:
            entry = json.loads(store.get(key))
        except ValueError:
            continue
        if isinstance(entry, dict) and "id" in entry:
            yield entry


def _is_about(entry: Mapping[str, Any], what: str) -> bool:
    pointers = [value for values in entry["points_to"].values() for value in values]
    return any(str(value).startswith(what) for value in pointers) or any(
        what in (run["model"], run["title"]) for run in entry["runs"]
    )


def report_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An index entry as a row of `tita reports list`."""
    scores = (f"{s['title']} {s['metric']} {s['score']:.1f}" for s in entry["scores"])
    return {
        "report": entry["id"],
        "questions": max(run["num_questions"] for run in entry["runs"]),
        "good": {True: "yes", False: "no"}.get(entry["good"], ""),
        "scores": "; ".join(scores),
    }


def read_page(entry: Mapping[str, Any], name: str, *, store: Store) -> str:
    """One of a report's files, as text."""
    return store.get(f"{REPORTS}/{entry['id']}/{name}").decode("utf-8")


def find_report(name: str, *, store: Store) -> dict[str, Any]:
    """The index entry of a report by its id, the start of it, or `latest` or `last-good`.

    Raises:
        TitaError: none or several have that name.
    """
    if name in ("latest", "last-good"):
        newest = (entry for entry in _newest_first(store) if name == "latest" or entry["good"])
        fit = list(itertools.islice(newest, 1))
    else:
        fit = list(_newest_first(store, start=name))
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise TitaError(
            f"several reports begin with {name!r}", remedy=", ".join(entry["id"] for entry in fit)
        )
    raise TitaError(f"no report {name!r}", where=store.uri, remedy="see `tita reports list`")


def fetch(entry: Mapping[str, Any], *, store: Store, into: Path | None = None) -> Path:
    """Copy a report with its results here, every file verified; returns the folder.

    Raises:
        TitaError: the report is not what the index says, or incomplete.
    """
    prefix = f"{REPORTS}/{entry['id']}"
    manifest = store.read_manifest(prefix)
    if manifest is None or manifest.digest != entry["digest"]:
        raise TitaError(
            "the report in the store is not the one that was indexed",
            where=f"{store.uri}/{prefix}",
            remedy="it was changed or deleted; publish it again",
        )
    return store.pull_tree(prefix, into=into)


def _entry(report: Mapping[str, Any], *, good: bool | None) -> dict[str, Any]:
    runs = report["runs"]
    return {
        "id": report["id"],
        "created": report["created"],
        "good": good,
        "points_to": _points_to(report),
        "runs": [
            {
                "title": run["title"],
                "model": run["model_name"],
                "weight": run["weight"],
                "file": run["file"],
                "num_questions": run["num_questions"],
                "success_rate": run["success_rate"],
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
    """What the report is about, by digest or name: questions, checkpoints, training runs."""
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
    """Question files in `folder` that the results were made from."""
    wanted = {run["questions_sha256"] for run in report["runs"]} - {None}
    files = (path for path in folder.iterdir() if path.suffix in ENDINGS) if wanted else ()
    return {path for path in files if digest_of(path) in wanted}
