"""Entry point of the benchmark CronJob: `python -m tita.bench`."""

import sys

from tita.bench.job import run_job
from tita.errors import TitaError
from tita.recipe_sources import parse_recipe_variable
from tita.recipes import BenchmarkRecipe, load_recipe
from tita.settings import settings
from tita.storage import open_store
from tita.terminal import configure_logging


def main() -> None:
    """Run the job with the recipe in `TITA_RECIPE`."""
    environment = settings()
    configure_logging(environment.log_level)
    recipe = load_recipe(BenchmarkRecipe, parse_recipe_variable(environment.recipe))
    run_job(recipe, store=open_store(), run_id=environment.run or "benchmark")


if __name__ == "__main__":
    try:
        main()
    except TitaError as error:
        print(f"benchmark: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
