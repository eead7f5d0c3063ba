"""One worker of `build-pairs`: `python -m tita.pairs` under torchrun, or alone."""

import os
import sys
import time

from tita.errors import TitaError, from_os_error
from tita.pairs.build import build_share, read_work
from tita.pairs.finish import finish
from tita.recipes import PairsRecipe, load_recipe, parse_laid_over
from tita.settings import settings
from tita.storage import open_store
from tita.terminal import configure_logging, say
from tita.vlm import load_vlm, model_digest


def main() -> None:
    """Do this worker's share, then finish the run if it was the last."""
    here = settings()
    configure_logging(here.log_level)
    recipe = load_recipe("build-pairs", laid_over=parse_laid_over(here.recipe))
    assert isinstance(recipe, PairsRecipe)
    run = here.run or "pairs"
    store = open_store()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    work = read_work(recipe, run=run, store=store)
    base = load_vlm(recipe.model, store=store, dtype=recipe.dtype)
    build_share(work, base=base, store=store, rank=rank, world_size=world_size)
    model = {"name": recipe.model, "digest": model_digest(base, store=store)}
    out = recipe.out or f"pairs/{run}"
    # Worker 0 waits for the others, who may run in other pods: only the store is shared.
    while not finish(work, out=out, run=run, model=model, store=store) and rank == 0:
        time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except (TitaError, OSError) as error:
        told = from_os_error(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        say(f"build-pairs: {told}")
        sys.exit(told.exit_code)
