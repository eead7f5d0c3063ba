"""The two models that are part of the package; `make demo-models` trains them again."""

import json
import shutil
from pathlib import Path
from typing import Literal

from tita.errors import TitaError

WEIGHTS_FOLDER = Path(__file__).parent / "weights"

Role = Literal["base", "reward"]
ROLES: tuple[Role, ...] = ("base", "reward")


def demo_model_path(role: Role) -> Path:
    """Return the folder of a model, an ordinary transformers checkpoint.

    Raises:
        TitaError: this installation has no weights.
    """
    path = WEIGHTS_FOLDER / role
    if not (path / "model.safetensors").is_file():
        raise TitaError("no weights in it", where=str(path), remedy="run `make demo-models`")
    return path


def copy_with_context(folder: Path, *, context: int = 4096) -> dict[Role, Path]:
    """Copy both models to `folder` with a longer context, for tests of long requests.

    The position embeddings are rotary, so no weight depends on the context. Answers beyond the 64
    tokens of the training are meaningless.
    """
    copies: dict[Role, Path] = {}
    for role in ROLES:
        copies[role] = Path(shutil.copytree(demo_model_path(role), folder / role))
        path = copies[role] / "config.json"
        config = json.loads(path.read_text())
        config["text_config"]["max_position_embeddings"] = context
        path.write_text(json.dumps(config))
        # Its digests are those of the original files.
        (copies[role] / "manifest.json").unlink(missing_ok=True)
    return copies
