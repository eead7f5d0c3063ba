"""The two models that come with the package; `make demo-models` trains them again."""

import json
import shutil
from pathlib import Path
from typing import Literal

from tita.errors import TitaError

WEIGHTS = Path(__file__).parent / "weights"


Role = Literal["base", "reward"]
ROLES: tuple[Role, ...] = ("base", "reward")


def demo_model_path(role: Role) -> Path:
    """The folder of a shipped model, an ordinary transformers checkpoint.

    Raises:
        TitaError: the weights were left out of this installation.
    """
    path = WEIGHTS / role
    if not (path / "model.safetensors").is_file():
        raise TitaError("no weights in it", where=str(path), remedy="run `make demo-models`")
    return path


def lengthened(folder: Path, *, context: int = 4096) -> dict[Role, Path]:
    """Copies of both models in `folder` that take `context` tokens, for tests of long requests.

    Their positions are rotary, so that no weight depends on how many there are; what they say past
    the 64 tokens that they were trained on makes no sense.
    """
    found: dict[Role, Path] = {}
    for role in ROLES:
        found[role] = Path(shutil.copytree(demo_model_path(role), folder / role))
        path = found[role] / "config.json"
        config = json.loads(path.read_text())
        config["text_config"]["max_position_embeddings"] = context
        path.write_text(json.dumps(config))
        # It lists the digests of files as they were.
        (found[role] / "manifest.json").unlink(missing_ok=True)
    return found
