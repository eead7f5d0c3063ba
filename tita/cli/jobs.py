"""`tita jobs`: runs in the cluster."""

import time
from typing import Annotated

import typer

from tita.cli.app import OutputFormat, new_app
from tita.cli.launch import AllRanks, Context, Namespace, connect
from tita.terminal import Output, emit, say

app = new_app("List, watch, cancel and delete runs in the cluster.")


def _run_names(incomplete: str) -> list[str]:
    from tita.errors import TitaError
    from tita.launch.cluster import Cluster, RetryPolicy
    from tita.launch.jobs import list_names
    from tita.launch.kubeconfig import load_access

    try:  # shell completion must be quick
        names = list_names(Cluster(load_access(), retry=RetryPolicy(attempts=1, timeout_s=2.0)))
    except TitaError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Run = Annotated[str, typer.Argument(help="Run name.", autocompletion=_run_names)]


@app.command("list")
def list_jobs(
    job: Annotated[str | None, typer.Option(help="List only runs of this job.")] = None,
    all_namespaces: Annotated[
        bool, typer.Option("-A", "--all-namespaces", help="List runs in all namespaces.")
    ] = False,
    context: Context = None,
    namespace: Namespace = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List runs, oldest first."""
    from tita.launch.display import age
    from tita.launch.jobs import list_jobs as read_all
    from tita.launch.objects import epoch

    cluster = connect(context, namespace)
    rows = read_all(cluster, job=job, all_namespaces=all_namespaces)
    if not rows and output is Output.TABLE:
        where = "any namespace" if all_namespaces else f"namespace {cluster.namespace}"
        say(f"no runs in {where}")
    if output is Output.TABLE:
        rows = [row | {"age": age(time.time() - epoch(row["created"]))} for row in rows]
    columns = ["run", "job", "phase", "pods", "age", "release", "namespace", "why"]
    emit(rows, output=output, columns=columns)


@app.command()
def status(
    run: Run,
    context: Context = None,
    namespace: Namespace = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Show a run's phase and pods, why it waits, or how it ended."""
    from tita.launch.jobs import read_status

    found = read_status(connect(context, namespace), run)
    if output is not Output.TABLE:
        emit(found, output=output)
        return
    pods, messages = found.pop("pods"), found.pop("told")
    emit(found)
    emit(pods)
    for line in messages:
        say(line)


@app.command()
def watch(
    run: Run,
    all_ranks: AllRanks = False,
    context: Context = None,
    namespace: Namespace = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Watch a run until it ends; exits with the run's exit code."""
    from tita.launch.follow import watch_run

    cluster = connect(context, namespace)
    raise typer.Exit(watch_run(cluster, run, output=output, all_ranks=all_ranks))


@app.command()
def logs(
    run: Run,
    all_ranks: AllRanks = False,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for new lines until the run ends.")
    ] = True,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Print a run's log; after its pods are deleted, rank 0's log from the store."""
    from tita.launch.logs import print_logs

    cluster = connect(context, namespace)
    raise typer.Exit(print_logs(cluster, run, all_ranks=all_ranks, follow=follow))


@app.command()
def cancel(run: Run, context: Context = None, namespace: Namespace = None) -> None:
    """Stop a run's pods; its Job and checkpoints are kept."""
    from tita.launch.jobs import cancel as cancel_run

    say(cancel_run(connect(context, namespace), run))


@app.command()
def delete(
    run: Run,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until its pods have ended.")
    ] = True,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Delete a run's Job and pods; its results in the store are kept."""
    from tita.launch.jobs import delete as delete_run

    delete_run(connect(context, namespace), run, wait=wait)
    state = "deleted" if wait else "being deleted"
    say(f"{run} is {state}; its results in the store are kept")
