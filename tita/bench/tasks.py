"""`tita-bench run`, `sweep` and `judge`: a question file, a model endpoint, and a results file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tita.bench.endpoint import model_links
from tita.bench.judge import judge_items
from tita.bench.questions import BenchmarkItem, read_items
from tita.bench.registry import ModelEndpoint
from tita.bench.results_file import ResultsFile
from tita.bench.scoring import check_metric
from tita.bench.worker_pool import ClientOptions, GenerationOptions, RequestStats, ask_endpoint
from tita.errors import TitaError
from tita.storage.manifest import sha256_of

_JUDGE_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkTask:
    """Questions, generation options, and the results file to write."""

    questions: Path
    images: Path
    out: Path
    limit: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def items(self) -> list[BenchmarkItem]:
        """The questions; every image and metric is checked before the first request is sent.

        Raises:
            TitaError: an image is missing, or a metric is unknown.
        """
        items = list(read_items(self.questions, limit=self.limit))
        for item in items:
            check_metric(item.metric, where=f"{self.questions}, question {item.id}")
            for image in item.images:
                if not (self.images / image).is_file():
                    raise TitaError(
                        f"no image {image} for question {item.id}",
                        where=str(self.images),
                        remedy="check --images",
                    )
        return items

    def protocol(self, *, model_name: str) -> dict[str, Any]:
        """The fields that all lines of the results file share."""
        return {
            "model_name": model_name,
            "weight": self.generation.weight,
            "questions_sha256": sha256_of(self.questions),
            "max_new_tokens": self.generation.max_new_tokens,
            "temperature": self.generation.temperature,
        }


def run_endpoint(
    task: BenchmarkTask,
    endpoint: ModelEndpoint,
    *,
    options: ClientOptions,
    extra: Mapping[str, Any] | None = None,
) -> RequestStats:
    """Send the questions of `task` that its results file has no answer to yet.

    Args:
        extra: additional fields of every line, such as the job's run id.
    """
    items = task.items()
    model = endpoint.model
    links = model_links(endpoint.base_url, model_id=model.id, key=endpoint.key)
    run = {
        **task.protocol(model_name=endpoint.name), "model_id": model.id, **links, **(extra or {}),
    }  # fmt: skip
    if model.price is not None:
        run["price"] = model.price.model_dump()
    with ResultsFile(task.out, run=run) as results:
        return ask_endpoint(
            items, results, endpoint=endpoint, images=task.images, run=run,
            generation=task.generation, options=options,
        )  # fmt: skip


def sweep_tasks(
    task: BenchmarkTask, *, weights: Sequence[float], model: str
) -> list[BenchmarkTask]:
    """One task per guidance weight; each writes its own results file in the folder `task.out`."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", model)
    return [
        replace(
            task,
            out=task.out / f"{stem}_w{weight:g}.jsonl",
            generation=replace(task.generation, weight=weight),
        )
        for weight in weights
    ]


def judge_answers(
    results: Path, endpoint: ModelEndpoint, *, out: Path, options: ClientOptions
) -> RequestStats:
    """Have a judge model review every open answer of a results file; see `tita.bench.judge`."""
    items = list(judge_items(results))
    run = {
        "model_name": endpoint.name,
        "model_id": endpoint.model.id,
        "judges": results.name,
        "max_new_tokens": _JUDGE_TOKENS,
        "temperature": 0.0,
    }
    prompts = {item.id: item.text for item in items}
    with ResultsFile(out, run=run, prompts=prompts) as file:
        return ask_endpoint(
            items, file, endpoint=endpoint, images=results.parent, run=run,
            generation=GenerationOptions(max_new_tokens=_JUDGE_TOKENS), options=options,
        )  # fmt: skip
