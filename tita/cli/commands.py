"""All sub-commands of `tita`: importing this registers them, in the order of `tita --help`."""

from tita.cli import benchmark, demo, launch, reports, workload
from tita.cli.app import app

app.add_typer(reports.app, name="reports")

__all__ = ["app", "benchmark", "demo", "launch", "workload"]
