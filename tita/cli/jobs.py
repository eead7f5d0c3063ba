"""`tita jobs`: runs in the cluster."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from tita.cli.app import new_app
from tita.terminal import Output, emit, say

if TYPE_CHECKING:
    from tita.launch.cluster import Cluster

app = new_app("List, watch, cancel and delete jobs in the cluster.")

Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
Namespace = Annotated[
    str | None, typer.Option("-n", "--namespace", help="The context's if not given.")
]
Form = Annotated[Output, typer.Option("-o", "--output", help="Form of the result.")]
AllRanks = Annotated[bool, typer.Option("--all-ranks", help="Logs of all pods, not of rank 0.")]


def _run_names(incomplete: str) -> list[str]:
    from tita.errors import TitaError
    from tita.launch.cluster import Cluster, RetryPolicy
    from tita.launch.jobs import list_names
    from tita.launch.kubeconfig import load_access

    try:
        # Somebody waits with a finger on the Tab key.
        names = list_names(Cluster(load_access(), retry=RetryPolicy(attempts=1, timeout_s=2.0)))
    except TitaError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Run = Annotated[str, typer.Argument(help="Name of the run.", autocompletion=_run_names)]


@app.command("list")
def list_jobs(
    job: Annotated[str | None, typer.Option(help="Only runs of this job.")] = None,
    context: Context = None,
    namespace: Namespace = None,
    output: Form = Output.TABLE,
) -> None:
    """List runs, oldest first."""
    from tita.launch.display import age
    from tita.launch.jobs import list_jobs as read_all
    from tita.launch.objects import epoch

    rows = read_all(_connect(context, namespace), job=job)
    if not rows and output is Output.TABLE:
        say("no runs")
    if output is Output.TABLE:
        rows = [row | {"age": age(time.time() - epoch(row["created"]))} for row in rows]
    emit(rows, output=output, columns=["run", "job", "phase", "pods", "age", "why"])


@app.command()
def status(
    run: Run, context: Context = None, namespace: Namespace = None, output: Form = Output.TABLE
) -> None:
    """Show a run's phase and pods, why it waits, or how it ended."""
    from tita.launch.jobs import read_status

    found = read_status(_connect(context, namespace), run)
    if output is not Output.TABLE:
        emit(found, output=output)
        return
    pods = found.pop("pods")
    told = found.pop("told")
    emit(found)
    emit(pods)
    for line in told:
        say(line)


@app.command()
def watch(
    run: Run,
    all_ranks: AllRanks = False,
    context: Context = None,
    namespace: Namespace = None,
    output: Form = Output.TABLE,
) -> None:
    """Watch a run to its end; the exit code is the run's."""
    from tita.launch.follow import watch_run

    raise typer.Exit(
        watch_run(_connect(context, namespace), run, output=output, all_ranks=all_ranks)
    )


@app.command()
def logs(
    run: Run, all_ranks: AllRanks = False, context: Context = None, namespace: Namespace = None
) -> None:
    """Print a run's log from its first line, and follow it to the end."""
    from tita.launch.follow import print_logs

    raise typer.Exit(print_logs(_connect(context, namespace), run, all_ranks=all_ranks))


@app.command()
def cancel(run: Run, context: Context = None, namespace: Namespace = None) -> None:
    """Stop a run's pods and keep its record; checkpoints stay in the store."""
    from tita.launch.jobs import cancel as stop

    say(stop(_connect(context, namespace), run))


@app.command()
def delete(
    run: Run,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until its pods have ended.")
    ] = True,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Delete a run's Job and pods; what is in the store stays."""
    from tita.launch.jobs import delete as remove

    remove(_connect(context, namespace), run, wait=wait)
    state = "deleted" if wait else "being deleted"
    say(f"{run} is {state}; results in the store are untouched")


def _connect(context: str | None, namespace: str | None) -> "Cluster":
    from tita.launch.cluster import connect

    return connect(context=context, namespace=namespace)
