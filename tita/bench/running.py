"""`tita-bench run`: a question file, a model, and the results file between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tita.bench.asking import Generation, Manners, Tally, ask_endpoint
from tita.bench.items import Item, digest_of, read_items
from tita.bench.registry import Model
from tita.bench.results import ResultsFile
from tita.bench.scoring import check_metric
from tita.errors import TitaError


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked, and where the answers go."""

    questions: Path
    images: Path
    out: Path
    limit: int | None = None
    generation: Generation = field(default_factory=Generation)

    def items(self) -> list[Item]:
        """The questions, checked: before anything is paid for, everything that is named is there.

        Raises:
            TitaError: an image is missing, or a metric unknown.
        """
        items = list(read_items(self.questions, limit=self.limit))
        for item in items:
            check_metric(item.metric, where=f"{self.questions}, question {item.id}")
            for image in item.images:
                if not (self.images / image).is_file():
                    raise TitaError(
                        f"no image {image}, which question {item.id} names",
                        where=str(self.images),
                        remedy="check --images",
                    )
        return items

    def protocol(self, *, model_name: str) -> dict[str, Any]:
        """What every line of the results file says about how it came to be."""
        return {
            "model_name": model_name,
            "weight": self.generation.weight,
            "questions_sha256": digest_of(self.questions),
            "max_new_tokens": self.generation.max_new_tokens,
            "temperature": self.generation.temperature,
        }


def run_endpoint(
    task: Task,
    *,
    name: str,
    model: Model,
    base_url: str,
    key: SecretStr | None,
    manners: Manners,
    extra: Mapping[str, Any] | None = None,
) -> Tally:
    """Ask an endpoint the questions of `task` that its results file does not hold yet.

    Args:
        name: what the results call the model.
        extra: more fields for every line, such as the digest of the reward checkpoint.
    """
    items = task.items()
    run = {**task.protocol(model_name=name), "model_id": model.id, **(extra or {})}
    if model.price is not None:
        run["price"] = model.price.model_dump()
    with ResultsFile(task.out, run=run) as results:
        return ask_endpoint(
            items,
            results,
            base_url=base_url,
            model_id=model.id,
            key=key,
            images=task.images,
            run=run,
            generation=task.generation,
            manners=manners,
        )
