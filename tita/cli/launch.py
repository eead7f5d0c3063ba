"""`tita launch`: submit a job and watch it, on a cluster or on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tita.cli.app import app
from tita.terminal import Output


def _job_names(incomplete: str) -> list[str]:
    from tita.jobspec import job_names

    return [name for name in job_names() if name.startswith(incomplete)]


@app.command()
def launch(
    job: Annotated[str, typer.Argument(help="A job in jobs/.", autocompletion=_job_names)],
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs in total.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes (pods).")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="One key of the recipe, key=value; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with some of the recipe's keys.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; made up if not given.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run as processes on this machine.")
    ] = False,
    store: Annotated[
        str | None, typer.Option(help="With --local: a directory or s3://bucket/prefix.")
    ] = None,
    output: Annotated[Output, typer.Option("-o", "--output")] = Output.TABLE,
) -> None:
    """Submit a job and watch it; Ctrl-C lets go of it, and it goes on."""
    from tita.errors import TitaError
    from tita.launch.names import check_run_name, new_run_name
    from tita.recipes import load_recipe, read_overrides

    laid_over = read_overrides(file=recipe, overrides=overrides or [])
    load_recipe(job, laid_over=laid_over)
    run = check_run_name(name) if name else new_run_name(job)
    if local:
        code = _launch_here(job, laid_over, run=run, store=store, gpus=gpus, nodes=nodes or 1)
        raise typer.Exit(code)
    raise TitaError("no cluster", remedy="add --local")


def _launch_here(
    job: str,
    laid_over: dict[str, Any],
    *,
    run: str,
    store: str | None,
    gpus: int | None,
    nodes: int,
) -> int:
    from tita.launch.local import num_gpus, run_local
    from tita.launch.shape import Shape, shape_of
    from tita.settings import settings
    from tita.terminal import say

    wanted = max(1, gpus if gpus is not None else nodes)
    shape = shape_of(Shape(nodes=1, gpus_per_node=wanted), gpus=wanted, nodes=nodes)
    here = num_gpus()
    if here < wanted:
        say(f"{here} GPUs here: {wanted} worker processes on the CPU stand for them")
    where = store or settings().store
    say(f"run {run}, results in {where}; Ctrl-C ends it, and the same --name goes on with it")
    return run_local(
        job,
        recipe=laid_over,
        run=run,
        store=where,
        nodes=shape.nodes,
        procs_per_node=shape.procs_per_node,
    )
