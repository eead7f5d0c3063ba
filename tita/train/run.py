"""What all parts of one training run share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.recipes import TrainRecipe
from tita.settings import settings
from tita.storage import Store
from tita.train.checkpoints import Checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every part of a run needs to know of it; the warm-up is a part with own folders."""

    recipe: TrainRecipe
    name: str
    out: str
    """Where in the store its folder goes."""
    folder: Path
    """Where it works, on this node's disk."""
    store: Store

    @property
    def meta(self) -> dict[str, Any]:
        """What the manifest says of the run's folder."""
        return {
            "job": "train-dpo",
            "run": self.name,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def checkpoints(self) -> Checkpoints:
        """Those below `out`."""
        here = settings()
        meta = {
            "recipe": self.recipe.model_dump(mode="json"),
            "processes": here.num_nodes * here.procs_per_node,
        }
        return Checkpoints(
            store=self.store, out=self.out, node=here.node_rank, num_nodes=here.num_nodes, meta=meta
        )
