"""The two models that come with the package; `make demo-models` trains them again."""

from pathlib import Path
from typing import Literal

from tita.errors import TitaError

WEIGHTS = Path(__file__).parent / "weights"


def demo_model_path(role: Literal["base", "reward"]) -> Path:
    """The folder of a shipped model, an ordinary transformers checkpoint.

    Raises:
        TitaError: the weights were left out of this installation.
    """
    path = WEIGHTS / role
    if not (path / "model.safetensors").is_file():
        raise TitaError("no weights in it", where=str(path), remedy="run `make demo-models`")
    return path
