"""`tita reports`: benchmark reports in the store."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import new_app
from tita.terminal import Output, emit, say

app = new_app("List, show, fetch and open benchmark reports in the store.")

Name = Annotated[str, typer.Argument(help="Id, the start of one, `latest` or `last-good`.")]
StoreUri = Annotated[str | None, typer.Option(help="s3://bucket/prefix or a folder.")]
Form = Annotated[Output, typer.Option("-o", "--output", help="Form of the result.")]


@app.command("list")
def list_reports(
    about: Annotated[
        str | None,
        typer.Option(help="Only reports on this model, checkpoint, run or question digest."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the newest so many.")] = 50,
    store: StoreUri = None,
    output: Form = Output.TABLE,
) -> None:
    """List reports, oldest first."""
    from tita.bench.archive import read_index, report_row
    from tita.storage import open_store

    entries = read_index(open_store(store), about=about, limit=limit)
    if output is Output.TABLE:
        if not entries:
            say("no reports")
        emit([report_row(entry) for entry in entries])
    else:
        emit(entries, output=output)


@app.command()
def show(name: Name = "latest", store: StoreUri = None, output: Form = Output.TABLE) -> None:
    """Print a report as text, or whole with -o json."""
    import json

    from tita.bench.archive import find_report, read_page
    from tita.storage import open_store

    opened = open_store(store)
    entry = find_report(name, store=opened)
    if output is Output.TABLE:
        print(read_page(entry, "benchmark_report.txt", store=opened), end="")
    else:
        emit(json.loads(read_page(entry, "report.json", store=opened)), output=output)


@app.command()
def fetch(
    name: Name,
    into: Annotated[
        Path | None, typer.Option(help="Folder; named after the report if not.")
    ] = None,
    store: StoreUri = None,
) -> None:
    """Copy a report with its results and questions here; every file is verified."""
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
    browser: Annotated[bool, typer.Option(help="Start a browser, or only print the path.")] = True,
) -> None:
    """Fetch a report and open its page in a browser."""
    import webbrowser

    from tita.bench.archive import fetch as fetch_report
    from tita.bench.archive import find_report
    from tita.settings import settings
    from tita.storage import open_store

    opened = open_store(store)
    entry = find_report(name, store=opened)
    folder = settings().cache_dir.expanduser() / "reports" / str(entry["digest"])[:16]
    if not (folder / "report.html").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetch_report(entry, store=opened, into=folder)
    page = folder / "report.html"
    print(page)
    if browser and not webbrowser.open(page.as_uri()):
        say("no browser here; open the file above in one")
