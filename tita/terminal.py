"""Terminal output: results go to standard output; progress and logs to standard error."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol

from tita.activity import Stage, is_reported, mark_progress, stage
from tita.json_text import dump_json


class Output(StrEnum):
    """Output formats (`-o`)."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


class Advance(Protocol):
    """Advances a progress bar by `amount` units; `note` is shown beside it."""

    def __call__(self, amount: float = 1, *, note: str = "") -> None: ...


def configure_logging(level: str = "info") -> None:
    """Log to standard error, one line per record, in UTC so that lines of pods can be compared."""
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s")
    formatter.converter = time.gmtime
    formatter.default_msec_format = "%s.%03d"
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tita").setLevel(level.upper())


def say(text: str) -> None:
    """Print one line for the user to standard error."""
    print(text, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """`1 pod`, `2 pods`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def emit(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    output: Output = Output.TABLE,
    columns: Sequence[str] | None = None,
) -> None:
    """Print a result to standard output.

    Args:
        rows: one record or a sequence of records with JSON-serialisable values.
        output: format.
        columns: columns of the table; defaults to the keys of the first row.
    """
    if output is Output.JSON:
        print(dump_json(rows, indent=2, default=str))
    elif output is Output.YAML:
        import yaml

        plain = json.loads(dump_json(rows, default=str))
        print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), end="")
    else:
        _print_table([rows] if isinstance(rows, Mapping) else rows, columns=columns)


_MIN_WIDTH = 10
"""Cells of up to this many characters are not wrapped."""
_GAP = 2
"""Number of characters between two columns."""


def _print_table(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    names = list(columns or rows[0])
    console = Console(markup=False, highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        numeric = all(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    # The first column is a name that users copy into the next command, so it is never wrapped, even
    # if the table becomes wider than the terminal.
    table.columns[0].no_wrap = True
    least = -_GAP
    for column in table.columns:
        longest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        column.min_width = longest if column.no_wrap else min(longest, _MIN_WIDTH)
        least += column.min_width + _GAP
    console.width = max(console.width, least)
    console.print(table)


@contextmanager
def progress(what: str, *, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show progress: a live bar on a terminal, otherwise one line every ten seconds.

    It is also a stage of this process in `tita.activity`; where stages are reported, no lines are
    printed.

    Args:
        what: a short description of the work.
        total: number of units; None if unknown.
        unit: `bytes` is formatted as a size, any other unit as a count.
    """
    with stage(what, total=total, unit=unit) as entered:
        if sys.stderr.isatty():
            yield from _bar(entered)
        else:
            yield from _lines(entered)


def _bar(entered: Stage) -> Iterator[Advance]:
    from rich import progress as bars
    from rich.console import Console

    count: list[bars.ProgressColumn] = (
        [bars.DownloadColumn(), bars.TransferSpeedColumn()]
        if entered.unit == "bytes"
        else [bars.MofNCompleteColumn()]
    )
    columns = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        *count,
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    ]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(entered.name, total=entered.total, note="")

        def advance(amount: float = 1, *, note: str = "") -> None:
            if amount:
                mark_progress()
                entered.done += amount
            display.update(task, advance=amount)
            if note:
                display.update(task, note=note)

        yield advance


def _lines(entered: Stage, *, every_s: float = 10.0) -> Iterator[Advance]:
    started = said = time.monotonic()

    def advance(amount: float = 1, *, note: str = "") -> None:
        nonlocal said
        if amount:
            mark_progress()
        entered.done += amount
        now = time.monotonic()
        if now - said < every_s or is_silent:
            return
        said = now
        done, total, rate = entered.done, entered.total, ""
        left = f", {(now - started) * (total - done) / done:.0f} s left" if total and done else ""
        if entered.unit == "bytes":
            rate = f", {done / (1 << 20) / (now - started):.1f} MiB/s"
        count = amount_of(done, total=total, unit=entered.unit)
        say(f"{entered.name}: {count}{rate}{left} {note}".rstrip())

    is_silent = is_reported()
    yield advance


def amount_of(done: float, *, total: float | None, unit: str) -> str:
    """`3/40 batches`, `12/340 MiB`, or without a total `3 batches`."""
    size, name = (1 << 20, "MiB") if unit == "bytes" else (1, unit)
    of = f"/{total / size:.0f}" if total else ""
    return f"{done / size:.0f}{of} {name}".rstrip()
