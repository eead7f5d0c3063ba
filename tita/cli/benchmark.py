"""`tita benchmark`: the nightly job as pods run it; `tita-bench` is the command for people."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app


@app.command()
def benchmark(
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with some of the recipe's keys.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="One key of the recipe, as key=value; repeatable."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Id of this run; from TITA_RUN if not given.")
    ] = None,
) -> None:
    """Ask an endpoint with several weights, report to the store, and hold it to the last good."""
    from tita.bench.job import run_job
    from tita.errors import TitaError
    from tita.recipes import BenchmarkRecipe, resolve_recipe
    from tita.settings import settings
    from tita.storage import open_store

    here = settings()
    whole = resolve_recipe(BenchmarkRecipe, file=recipe, overrides=overrides or [])
    try:
        entry = run_job(whole, store=open_store(), run_id=run or here.run or "benchmark")
    except TitaError as error:
        # The pod's last word, which the launcher shows.
        if here.termination_log is not None:
            import json

            word = {"exit_code": int(error.exit_code), "error": str(error)}
            here.termination_log.write_text(json.dumps(word), encoding="utf-8")
        raise
    print(entry["id"])
