"""Trees that jobs leave in the store: whether one is there already."""

from collections.abc import Mapping
from typing import Any

from tita.errors import TitaError
from tita.storage.store import Store


def is_done(out: str, *, recipe: Mapping[str, Any], store: Store) -> bool:
    """Whether the tree `out` is there, made with this recipe.

    Its writer has put the recipe, as JSON has it, into the manifest's `meta`.

    Raises:
        TitaError: it is there, and of another recipe.
    """
    done = store.read_manifest(out)
    if done is None:
        return False
    if done.meta.get("recipe") != recipe:
        raise TitaError(
            "something of another recipe is there", where=out, remedy="choose another run name"
        )
    return True
