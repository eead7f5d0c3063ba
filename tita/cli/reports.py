"""`tita reports`: benchmark reports in the store."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import OutputFormat, StoreUri, new_app
from tita.terminal import Output, emit, say

app = new_app("List, show, fetch and open benchmark reports in the store.")

Name = Annotated[str, typer.Argument(help="Report id or a prefix of it, `latest` or `last-good`.")]


@app.command("list")
def list_reports(
    about: Annotated[
        str | None,
        typer.Option(help="Only reports on this model, checkpoint, run or question digest."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of reports.")] = 50,
    store: StoreUri = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List the newest reports, oldest first."""
    from tita.bench.archive import read_index
    from tita.storage import open_store

    opened = open_store(store)
    entries = read_index(opened, about=about, limit=limit)
    if output is not Output.TABLE:
        emit(entries, output=output)
        return
    if not entries:
        say(f"no reports in {opened.uri}")
    emit(
        [
            {
                "report": entry["id"],
                "questions": max(run["num_questions"] for run in entry["runs"]),
                "good": {True: "yes", False: "no"}.get(entry["good"], ""),
                "scores": "; ".join(
                    f"{s['title']} {s['metric']} {s['score']:.1f}" for s in entry["scores"]
                ),
            }
            for entry in entries
        ]
    )


@app.command()
def show(
    name: Name = "latest", store: StoreUri = None, output: OutputFormat = Output.TABLE
) -> None:
    """Print a report as text, or all of its data with -o json."""
    from tita.bench.archive import REPORTS, find_report
    from tita.storage import open_store

    opened = open_store(store)
    folder = f"{REPORTS}/{find_report(name, store=opened)['id']}"
    if output is Output.TABLE:
        print(opened.get(f"{folder}/benchmark_report.txt").decode(), end="")
    else:
        emit(json.loads(opened.get(f"{folder}/report.json")), output=output)


@app.command()
def fetch(
    name: Name,
    into: Annotated[Path | None, typer.Option(help="Target folder; default: the id.")] = None,
    store: StoreUri = None,
) -> None:
    """Download and verify a report with its results and questions."""
    from tita.bench.archive import fetch as fetch_report
    from tita.bench.archive import find_report
    from tita.storage import open_store

    opened = open_store(store)
    entry = find_report(name, store=opened)
    print(fetch_report(entry, store=opened, into=into or Path(entry["id"])))


@app.command("open")
def open_report(
    name: Name = "latest",
    store: StoreUri = None,
    browser: Annotated[
        bool, typer.Option(help="Open the page in a browser, not only print its path.")
    ] = True,
) -> None:
    """Download a report and open its page in a browser."""
    import webbrowser

    from tita.bench.archive import fetch as fetch_report
    from tita.bench.archive import find_report
    from tita.storage import open_store

    opened = open_store(store)
    entry = find_report(name, store=opened)
    page = fetch_report(entry, store=opened).absolute() / "report.html"
    print(page)
    if browser and not webbrowser.open(page.as_uri()):
        say("no browser found; open the file above")
