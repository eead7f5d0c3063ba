"""One rank of `train-dpo`: `python -m tita.train` under torchrun."""

import importlib
import importlib.util
import os
import sys
import tempfile
import warnings

from tita.imports import without_garbage_collection

with without_garbage_collection():
    import torch

    from tita.errors import ExitCode, TitaError, from_os_error, is_disk_full, is_out_of_memory
    from tita.gang import record_exit_code, scratch_folder
    from tita.recipe_sources import parse_recipe_variable
    from tita.recipes import TrainRecipe, validate_recipe
    from tita.settings import settings
    from tita.storage import open_store
    from tita.terminal import configure_logging, say
    from tita.train.liveness import PEER_MONITOR, is_lost_peer
    from tita.train.memory import cheaper_recipes


def main() -> None:
    """Run this rank, and exit with a code that says how it ended."""
    # The libraries report each other's renamed arguments at every step.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # The data loader forks its workers, which the tokenizers' threads do not survive.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed imports MLflow where it is installed, which then reports its use to its authors.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    code, recipe = 0, None
    try:
        environment = settings()
        configure_logging(environment.log_level)
        recipe = validate_recipe(TrainRecipe, parse_recipe_variable(environment.recipe))
        # DeepSpeed reads the variables above when it is imported.
        with without_garbage_collection():
            import_wandb()
            from tita.train.training import train

        train(recipe, run=environment.run or "train-dpo", store=open_store())
    except Exception as error:
        PEER_MONITOR.stop()
        code = report_error(error, recipe=recipe)
        if not code:
            raise
    record_exit_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # A regular exit waits for collectives that no other rank joins, and may abort even after
    # success: the libraries leave threads behind that use the group.
    os._exit(code)


def import_wandb() -> None:
    """Import Weights & Biases with its temporary folders in the gang's, which is removed.

    TRL imports it where it is installed. It removes them at a regular exit only.
    """
    folder, before = scratch_folder(), tempfile.tempdir
    if folder is None or importlib.util.find_spec("wandb") is None:
        return
    tempfile.tempdir = str(folder)
    try:
        importlib.import_module("wandb")
    finally:
        tempfile.tempdir = before


def report_error(error: BaseException, *, recipe: TrainRecipe | None) -> int:
    """Report the error in one line and return its exit code; 0 for errors that need a traceback."""
    rank = os.environ.get("RANK", "0")
    if is_disk_full(error):
        # Counted and retried: the next pod may have more space, and preflight checks it.
        say(
            f"train-dpo: rank {rank}: the disk is full, and a checkpoint cannot be written; free "
            "space in TITA_SCRATCH_DIR, or on a cluster raise jobs.scratch.size"
        )
        return ExitCode.FAILED
    if isinstance(error, OSError):
        error = from_os_error(error) or error
    if isinstance(error, TitaError):
        error = _without_traceback(error)
        if rank == "0" or error.exit_code == ExitCode.USER:
            say(f"train-dpo: {error}")
        return error.exit_code
    first_line = (str(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        changes = [] if recipe is None else [change for change, _ in cheaper_recipes(recipe)[:3]]
        remedy = ", or ".join(changes) or "use more or larger GPUs, or a smaller model"
        say(f"train-dpo: rank {rank}: {first_line}; {remedy}")
        return ExitCode.OUT_OF_MEMORY
    if is_lost_peer(error):
        say(f"train-dpo: lost the connection to another rank ({first_line})")
        return ExitCode.LOST_PEER
    return ExitCode.OK


def _without_traceback(error: TitaError) -> TitaError:
    """The error of a worker of torch's data loader, which adds the worker's traceback to it."""
    if "\nOriginal Traceback" not in error.what:
        return error
    return type(error)(error.what.strip().splitlines()[-1].partition(": ")[2])


if __name__ == "__main__":
    main()
