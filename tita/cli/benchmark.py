"""`tita benchmark`: the nightly benchmark job, in a pod or on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app


@app.command()
def benchmark(
    recipe: Annotated[Path | None, typer.Option(help="YAML file with keys of the recipe.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Recipe key to override, as key=value; repeatable."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Run id; defaults to TITA_RUN.")] = None,
) -> None:
    """Benchmark an endpoint with several weights, publish a report and check the gates."""
    from tita.bench.job import run_job
    from tita.errors import TitaError
    from tita.recipes import BenchmarkRecipe, resolve_recipe
    from tita.settings import settings
    from tita.storage import open_store

    environment = settings()
    merged = resolve_recipe(BenchmarkRecipe, file=recipe, overrides=overrides or [])
    try:
        entry = run_job(merged, store=open_store(), run_id=run or environment.run or "benchmark")
    except TitaError as error:
        # The launcher shows the pod's termination message.
        if environment.termination_log is not None:
            message = {"exit_code": int(error.exit_code), "error": str(error)}
            environment.termination_log.write_text(json.dumps(message), encoding="utf-8")
        raise
    print(entry["id"])
