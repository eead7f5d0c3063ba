"""Registers all sub-commands of `tita`, in the order of `tita --help`."""

from tita.cli import (
    cache,
    data,
    demo,
    infer,
    jobs,
    launch,
    reports,
    runs,
    selftest,
    serve,
    workload,
)
from tita.cli.app import app

app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.add_typer(reports.app, name="reports")
app.add_typer(jobs.app, name="jobs")
app.add_typer(runs.app, name="runs")

__all__ = ["app", "demo", "infer", "launch", "selftest", "serve", "workload"]
