"""`tita runs`: training runs in the store."""

from typing import Annotated

import typer

from tita.cli.app import OutputFormat, StoreUri, new_app
from tita.terminal import Output, counted, emit, say

app = new_app("List, show and compare training runs in the store.")


@app.command("list")
def list_runs(store: StoreUri = None, output: OutputFormat = Output.TABLE) -> None:
    """List runs with their latest metrics."""
    from tita.launch.runs import list_runs as read_all
    from tita.storage import open_store

    opened = open_store(store)
    found = read_all(opened)
    if not found and output is Output.TABLE:
        say(f"no runs in {opened.uri}")
    emit([record.row() for record in found], output=output)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Run name.")],
    store: StoreUri = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Show a run's recipe, training curve, checkpoints and lineage."""
    from dataclasses import asdict

    from tita.gang.attempts import read_incidents
    from tita.launch.runs import evaluations, read_curve, read_run, read_trackers, significant
    from tita.storage import open_store

    opened = open_store(store)
    record = read_run(opened, run)
    incidents = read_incidents(opened, run)
    used = sum(incident.is_try for incident in incidents)
    trackers = read_trackers(opened, run)
    steps = list(read_curve(opened, run))
    curve = [asdict(step) for step in steps]
    if output is not Output.TABLE:
        counts = {"incidents": len(incidents), "tries_used": used}
        emit(asdict(record) | counts | {"trackers": trackers, "curve": curve}, output=output)
        return
    emit(record.row())
    emit([{"recipe": key, "value": str(value)} for key, value in record.recipe.items()])
    columns = ("step", "loss", "reward_margin", "reward_accuracy", "samples_per_s")
    emit([{name: significant(step[name]) for name in columns} for step in _thinned(curve)])
    if held_out := evaluations(steps):
        say("held-out pairs:")
        emit(_thinned(held_out))
    for warning in record.facts.get("warnings") or ():
        say(f"warning: {warning}")
    start = record.facts.get("start_model") or {}
    lineage = {"start model": start.get("name"), "digest": start.get("digest")}
    lineage["pairs"] = (record.facts.get("pairs") or {}).get("path")
    emit([{"lineage": key, "value": value} for key, value in lineage.items() if value])
    for name, link in trackers.items():
        say(f"{name}: {link}")
    if incidents:
        say(f"{counted(len(incidents), 'incident')}, {used} of them counted as tries")
    if record.checkpoints:
        say(f"checkpoints: {', '.join(record.checkpoints)}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run names.")],
    store: StoreUri = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Compare recipes and latest metrics of runs."""
    from tita.launch.runs import compare as compare_runs
    from tita.storage import open_store

    emit(compare_runs(open_store(store), runs), output=output)


def _thinned(curve: list[dict[str, float]], *, most: int = 20) -> list[dict[str, float]]:
    """At most `most` evenly spaced steps, including the last."""
    if len(curve) <= most:
        return curve
    picked = {round(i * (len(curve) - 1) / (most - 1)) for i in range(most)}
    return [curve[index] for index in sorted(picked)]
