"""One rank of `train-dpo`: `python -m tita.train` under torchrun."""

import os
import sys
import warnings

from tita.errors import ExitCode, TitaError, from_os_error
from tita.gang import tell_fate
from tita.recipes import TrainRecipe, load_recipe, parse_laid_over
from tita.settings import settings
from tita.storage import open_store
from tita.terminal import configure_logging, say
from tita.train.liveness import PEERS


def main() -> None:
    """Train this rank's part of the run that the environment describes."""
    # The libraries below warn one another of renamed arguments at every step.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Workers of the data loader are forked, which the tokenizers' own threads do not survive.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _tell_deepspeed_the_device()
    from tita.train.training import train

    here = settings()
    configure_logging(here.log_level)
    recipe = load_recipe("train-dpo", laid_over=parse_laid_over(here.recipe))
    assert isinstance(recipe, TrainRecipe)
    train(recipe, run=here.run or "train-dpo", store=open_store())


def _tell_deepspeed_the_device() -> None:
    """Spare the log DeepSpeed's warning that it found no GPU, where there is none to find."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _code_of(error: BaseException) -> int:
    """Say what went wrong, and find its exit code; 0 for what Python itself should report."""
    from tita.train.preemption import is_lost_peer

    if isinstance(error, OSError):
        error = from_os_error(error) or error
    if isinstance(error, TitaError):
        if os.environ.get("RANK", "0") == "0" or error.exit_code == ExitCode.USER:
            say(f"train-dpo: {error}")
        return error.exit_code
    first = (str(error).splitlines() or [""])[0]
    if _is_out_of_memory(error):
        say(f"train-dpo: rank {os.environ.get('RANK', '0')}: {first}; {_lighter()}")
        return ExitCode.OUT_OF_MEMORY
    if is_lost_peer(error):
        say(f"train-dpo: another rank is gone ({first})")
        return ExitCode.LOST_PEER
    return ExitCode.OK


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # Libraries below raise plain RuntimeErrors for it too: cuBLAS, NCCL, pinned host memory.
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        word in str(error) for word in words
    )


def _lighter() -> str:
    """Which settings of the recipe would take less memory."""
    from tita.train.memory import lighter

    recipe = load_recipe("train-dpo", laid_over=parse_laid_over(settings().recipe))
    assert isinstance(recipe, TrainRecipe)
    return ", or ".join(words for words, _ in lighter(recipe)[:3])


def _run() -> None:
    code = 0
    try:
        main()
    except Exception as error:
        PEERS.end()
        code = _code_of(error)
        if not code:
            raise
    tell_fate(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's end would wait for collectives that nobody else takes part in, and even
    # after a good one it may abort: the libraries leave threads that still use the group.
    os._exit(code)


if __name__ == "__main__":
    _run()
