"""One rank of `train-dpo`: `python -m tita.train` under torchrun."""

import os
import sys
import warnings

from tita.errors import ExitCode, TitaError
from tita.recipes import TrainRecipe, load_recipe, parse_laid_over
from tita.settings import settings
from tita.storage import open_store
from tita.terminal import configure_logging, say


def main() -> None:
    """Train this rank's part of the run that the environment describes."""
    # The libraries below warn one another of renamed arguments at every step.
    warnings.filterwarnings("ignore", category=FutureWarning)
    _tell_deepspeed_the_device()
    from tita.train.run import train

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


if __name__ == "__main__":
    try:
        main()
    except TitaError as error:
        if os.environ.get("RANK", "0") == "0":
            say(f"train-dpo: {error}")
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        say(f"train-dpo: {str(error).splitlines()[0]}; lower batch_size or choose zero3_offload")
        sys.exit(ExitCode.OUT_OF_MEMORY)
