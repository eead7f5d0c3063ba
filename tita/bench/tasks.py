"""`tita-bench run`: a question file, a model, and the results file between them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tita.bench.endpoint import model_links
from tita.bench.judge import judge_items
from tita.bench.questions import BenchmarkItem, digest_of, read_items
from tita.bench.registry import RegisteredModel, endpoint_of, find_key, load_registry
from tita.bench.results_file import ResultsFile
from tita.bench.scoring import check_metric
from tita.bench.worker_pool import ClientOptions, GenerationOptions, RequestStats, ask_endpoint
from tita.errors import TitaError

_JUDGE_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkTask:
    """What is asked, and where the answers go."""

    questions: Path
    images: Path
    out: Path
    limit: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def items(self) -> list[BenchmarkItem]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Who answers: an endpoint, or a model in this process."""

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    key_file: Path | None = None
    registry: Path | None = None
    local_model: str | None = None
    reward: str | None = None
    manners: ClientOptions = field(default_factory=ClientOptions)


def answer(task: BenchmarkTask, source: Source) -> RequestStats:
    """Have `source` answer the questions of `task` that its results file does not hold yet."""
    if source.local_model is not None:
        from tita.bench.local_model import run_local

        return run_local(
            task,
            name=source.model,
            base=source.local_model,
            reward=source.reward,
            batch_size=source.manners.concurrency,
        )
    if source.reward is not None:
        raise TitaError("--reward steers --local-model only", remedy="give --local-model too")
    entry = load_registry(source.registry).find(source.model)
    return run_endpoint(
        task,
        name=source.model,
        model=entry,
        base_url=endpoint_of(entry, name=source.model, base_url=source.base_url),
        key=find_key(
            entry, api_key=source.api_key, key_file=source.key_file, base_url=source.base_url
        ),
        manners=source.manners,
    )


def run_endpoint(
    task: BenchmarkTask,
    *,
    name: str,
    model: RegisteredModel,
    base_url: str,
    key: SecretStr | None,
    manners: ClientOptions,
    extra: Mapping[str, Any] | None = None,
) -> RequestStats:
    """Ask an endpoint the questions of `task` that its results file does not hold yet.

    Args:
        name: what the results call the model.
        extra: more fields for every line, such as the job that asks.
    """
    items = task.items()
    links = model_links(base_url, model_id=model.id, key=key)
    run = {**task.protocol(model_name=name), "model_id": model.id, **links, **(extra or {})}
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


def parse_weights(text: str) -> list[float]:
    """Weights in the form `0,0.1,0.3`.

    Raises:
        TitaError: one is no number between 0 and 1, or comes twice.
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or len(set(weights)) < len(weights) or not all(0 <= w <= 1 for w in weights):
        raise TitaError(
            f"{text!r} are no weights", where="--weights", remedy="write --weights 0,0.1,0.3"
        )
    return weights


def sweep_tasks(
    task: BenchmarkTask, *, weights: Sequence[float], model: str
) -> list[BenchmarkTask]:
    """`task` once a weight, with a results file of its own in the folder `task.out`."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", model)
    return [
        replace(
            task,
            out=task.out / f"{stem}_w{weight:g}.jsonl",
            generation=replace(task.generation, weight=weight),
        )
        for weight in weights
    ]


def judge_answers(results: Path, *, source: Source, out: Path) -> RequestStats:
    """Ask a judge about every free answer of a results file; see `tita.bench.judge`."""
    items = list(judge_items(results))
    entry = load_registry(source.registry).find(source.model)
    base_url = endpoint_of(entry, name=source.model, base_url=source.base_url)
    key = find_key(
        entry, api_key=source.api_key, key_file=source.key_file, base_url=source.base_url
    )
    generation = GenerationOptions(max_new_tokens=_JUDGE_TOKENS)
    run = {
        "model_name": source.model,
        "model_id": entry.id,
        "judges": results.name,
        "max_new_tokens": _JUDGE_TOKENS,
        "temperature": 0.0,
    }
    prompts = {item.id: item.text for item in items}
    with ResultsFile(out, run=run, prompts=prompts) as file:
        return ask_endpoint(
            items,
            file,
            base_url=base_url,
            model_id=entry.id,
            key=key,
            images=results.parent,
            run=run,
            generation=generation,
            manners=source.manners,
        )
