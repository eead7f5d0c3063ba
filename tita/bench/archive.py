"""Benchmark reports in the store: `reports/<date>-<id>/`, and one index entry per report.

The index is a folder with one small file per report, written after the report is complete: jobs
that publish at the same time do not overwrite each other's entry, and listing reads no report.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage import Store
from tita.storage.locate import store_command

REPORTS = "reports"
INDEX = f"{REPORTS}/index"
REPORT_FILES = ("report.json", "report.html", "benchmark_report.txt", "figures.csv")


def read_index(
    store: Store, *, about: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Index entries, oldest first.

    Args:
        about: only reports on this model, checkpoint, training run or digest, or a prefix of it.
        limit: maximum number of entries; the newest are kept.
    """
    newest = (e for e in _newest_first(store) if about is None or _is_about(e, about))
    return list(itertools.islice(newest, limit))[::-1]


def _newest_first(store: Store, *, start: str = "") -> Iterator[dict[str, Any]]:
    """Index entries whose ids begin with `start`; invalid entries are skipped."""
    keys = [info.key for info in store.list(f"{INDEX}/{start}")]
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


def find_report(name: str, *, store: Store) -> dict[str, Any]:
    """The index entry of a report, by id, a prefix of the id, `latest` or `last-good`.

    Raises:
        TitaError: no report has that name, or several do.
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
    command = store_command("reports list", store=store.uri)
    raise TitaError(f"no report {name!r}", where=store.uri, remedy=f"list them with `{command}`")


def good_reports(store: Store, *, questions_sha256: str) -> Iterator[dict[str, Any]]:
    """Index entries of good reports on one question set, newest first."""
    for entry in _newest_first(store):
        if entry["good"] and questions_sha256 in entry["points_to"].get("questions_sha256", ()):
            yield entry


def fetch(entry: Mapping[str, Any], *, store: Store, into: Path | None = None) -> Path:
    """Download and verify a report with its results; returns the folder.

    Raises:
        TitaError: the report is incomplete, or changed after it was indexed.
    """
    prefix = f"{REPORTS}/{entry['id']}"
    manifest = store.read_manifest(prefix)
    if manifest is None or manifest.digest != entry["digest"]:
        raise TitaError(
            "the report changed after it was indexed, or was deleted",
            where=f"{store.uri}/{prefix}",
            remedy="publish it again",
        )
    return store.pull_tree(prefix, into=into)
