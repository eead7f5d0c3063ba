"""One worker of `build-pairs`: `python -m tita.pairs` under torchrun, or alone."""

import os
import sys

from tita.errors import ExitCode, TitaError, from_os_error
from tita.gang import record_exit_code
from tita.pairs.build import build_share, read_work
from tita.pairs.finish import finish, wait_for_others
from tita.recipes import PairsRecipe, parse_recipe_variable, validate_recipe
from tita.settings import settings
from tita.storage import is_done, open_store
from tita.terminal import configure_logging, say
from tita.vlm import load_vlm


def main() -> None:
    """Do this worker's share; worker 0 then waits for all others and finishes the run."""
    here = settings()
    configure_logging(here.log_level)
    recipe = validate_recipe(PairsRecipe, parse_recipe_variable(here.recipe))
    run = here.run or "pairs"
    store = open_store()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    work = read_work(recipe, run=run, store=store)
    # In this order: batches are removed once the tree is there, and then none is missing.
    missing = work.missing(store)
    if is_done(work.out, recipe=recipe.model_dump(mode="json"), store=store):
        if rank == 0:
            work.sweep(store)
            say(f"{work.out} is there already")
        return
    mine = [number for number in missing if number % world_size == rank]
    if not mine and rank != 0:
        return
    base = load_vlm(recipe.model, store=store, dtype=recipe.dtype, image_aspect=recipe.image_aspect)
    build_share(work, mine, base=base, store=store, rank=rank)
    if rank == 0:
        wait_for_others(work, store=store)
        finish(work, run=run, base=base, store=store)


def _code_of(error: Exception) -> int:
    """Say what went wrong, and find its exit code; 0 for what Python itself should report."""
    import torch

    if isinstance(error, OSError):
        error = from_os_error(error) or error
    if isinstance(error, TitaError):
        say(f"build-pairs: {error}")
        return error.exit_code
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        first = (str(error).splitlines() or ["memory ran out"])[0]
        say(f"build-pairs: {first}; set batch_size or max_new_tokens lower")
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.OK


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        code = _code_of(error)
        if not code:
            raise
        record_exit_code(code)
        sys.exit(code)
