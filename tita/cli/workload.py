"""The jobs themselves: what pods run, and what `tita launch --local` runs on this machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app

_Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with some of the recipe's keys.")
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", help="One key of the recipe, as key=value; repeatable.")
]
_Run = Annotated[
    str | None, typer.Option("--run", help="Id of this run; from TITA_RUN if not given.")
]


@app.command()
def build_pairs(recipe: _Recipe = None, overrides: _Set = None, run: _Run = None) -> None:
    """Build preference pairs; the work of one node."""
    _work("build-pairs", recipe=recipe, overrides=overrides or [], run=run)


@app.command()
def train_dpo(recipe: _Recipe = None, overrides: _Set = None, run: _Run = None) -> None:
    """Train the reward model with DPO; the work of one node."""
    _work("train-dpo", recipe=recipe, overrides=overrides or [], run=run)


def _work(job: str, *, recipe: Path | None, overrides: list[str], run: str | None) -> None:
    from tita.errors import TitaError
    from tita.gang import run_workers
    from tita.jobspec import load_job
    from tita.recipes import load_recipe, parse_laid_over
    from tita.settings import settings

    here = settings()
    whole = load_recipe(
        job, file=recipe, laid_over=parse_laid_over(here.recipe), overrides=overrides
    )
    name = run or here.run
    if not name:
        raise TitaError("the run has no name", remedy="give --run NAME or set TITA_RUN")
    # Workers are processes of their own and read the same variables as this one.
    os.environ["TITA_RECIPE"] = whole.model_dump_json(exclude_unset=True)
    os.environ["TITA_RUN"] = name
    raise typer.Exit(run_workers(load_job(job).module, settings=here))
