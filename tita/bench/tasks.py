"""`tita-bench run`, `sweep` and `judge`: a question file, a model endpoint, and a results file."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tita.bench.conditions import load_title, run_conditions
from tita.bench.endpoint import model_links
from tita.bench.fetched_images import ImageDownloads
from tita.bench.judge import judge_items
from tita.bench.load_shape import ClientOptions
from tita.bench.questions import BenchmarkItem, read_items
from tita.bench.registry import ModelEndpoint
from tita.bench.request_body import GenerationOptions
from tita.bench.results_file import ResultsFile, read_results
from tita.bench.scoring import hides_options
from tita.bench.server_metrics import write_figures
from tita.bench.worker_pool import RequestStats, ask_endpoint
from tita.data.layout_counts import LayoutCounts
from tita.errors import TitaError
from tita.storage.image_shards import is_image
from tita.storage.manifest import sha256_of
from tita.terminal import progress, say

_JUDGE_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkTask:
    """Questions, generation options, and the results file to write."""

    questions: Path
    images: Path
    out: Path
    limit: int | None = None
    metric: str = ""
    """Metric of the questions that name none; empty: they are not scored."""
    ignore_columns: tuple[str, ...] = ()
    """Columns of the questions that are treated as absent."""
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    downloads: ImageDownloads | None = None
    """Downloads images that rows name by URL; without it such rows are an error."""

    def items(self) -> list[BenchmarkItem]:
        """The questions; every image is checked before the first request is sent.

        Raises:
            TitaError: a question or its reference is not valid, or an image is missing or was
                not fetched.
        """
        layouts = LayoutCounts()
        items = []
        with progress("reading the questions", total=self.limit, unit="questions") as advance:
            for item in self.read(limit=self.limit, layouts=layouts):
                items.append(item)
                advance()
        say(f"{self.questions.name}: {layouts.describe()}")
        if self.limit == len(items):
            items = self._without_cut_group(items)
        if self.downloads is not None:
            items = list(self.downloads.replace_urls(items))
        num_unscored = sum(1 for item in items if item.references and not item.metric)
        if num_unscored:
            say(
                f"{num_unscored} of {len(items)} questions have references but no metric and are "
                "not scored; give --metric, or a `metric` in the question file"
            )
        num_hidden = sum(hides_options(item.metric, item.text, item.choices) for item in items)
        if num_hidden:
            say(
                f"{num_hidden} of {len(items)} questions do not show their options to the model; "
                "write them in the question, as `tita-bench prepare` does"
            )
        for item in items:
            for image in item.images:
                if not is_image(self.images / image):
                    raise TitaError(
                        f"no image {image} for question {item.id}",
                        where=str(self.images),
                        remedy="check --images",
                    )
        return items

    def read(
        self, *, limit: int | None = None, layouts: LayoutCounts | None = None
    ) -> Iterator[BenchmarkItem]:
        """The questions of the file, all of them without a limit; images are not checked."""
        return read_items(
            self.questions, images=self.images, limit=limit, default_metric=self.metric,
            ignore=self.ignore_columns, layouts=layouts, urls=self.downloads is not None,
        )  # fmt: skip

    def _without_cut_group(self, items: list[BenchmarkItem]) -> list[BenchmarkItem]:
        """The questions without a last group of which `limit` cut off a part.

        A group is right only if all of its questions are, so a part of one would count as wrong.
        """
        group = items[-1].group
        following = next(itertools.islice(self.read(), len(items), None), None)
        if not group or following is None or following.group != group:
            return items
        kept = [item for item in items if item.group != group]
        if not kept:
            raise TitaError(
                f"the first group of questions has more than {len(items)}",
                where=str(self.questions),
                remedy="give a larger --max",
            )
        say(f"asking {len(kept)} questions: --max {len(items)} would cut group {group!r}")
        return kept

    def image_files(self, items: Iterable[BenchmarkItem]) -> dict[str, list[Path]]:
        """The images of questions by id, for the results file."""
        return {item.id: [self.images / image for image in item.images] for item in items}

    def protocol(self, *, model_name: str) -> dict[str, Any]:
        """The fields that all lines of the results file share."""
        # A system prompt may be in such a column.
        ignored = {"ignore_columns": list(self.ignore_columns)} if self.ignore_columns else {}
        return {
            "model_name": model_name,
            "questions_sha256": sha256_of(self.questions),
            **ignored,
            **self.generation.protocol(),
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
    links = _links(endpoint, out=task.out)
    run = {
        **task.protocol(model_name=endpoint.name), "model_id": model.id, **links, **(extra or {}),
    }  # fmt: skip
    if model.price is not None:
        run["price"] = model.price.model_dump()
    conditions = run_conditions(
        endpoint=endpoint.base_url, load=options.load(), options=options.others()
    )
    with ResultsFile(
        task.out, run=run, images=task.image_files(items), conditions=conditions
    ) as results:
        say_other_loads(results, conditions)
        stats = ask_endpoint(
            items, results, endpoint=endpoint, images=task.images, run=run,
            generation=task.generation, options=options,
        )  # fmt: skip
    if stats.server is not None:
        write_figures(task.out, session=conditions["session"], figures=stats.server)
    return stats


def _links(endpoint: ModelEndpoint, *, out: Path) -> dict[str, str]:
    """As of `model_links`; without them, the model that the answers so far in `out` name."""
    links = model_links(endpoint.base_url, model_id=endpoint.model.id, key=endpoint.key)
    if not links.get("model_digest") and out.is_file():
        # The list did not come in time.
        digest = next(read_results(out), {}).get("model_digest")
        links |= {"model_digest": digest} if digest else {}
    return links


def say_other_loads(results: ResultsFile, conditions: Mapping[str, Any]) -> None:
    """Say if the answers in a resumed file were measured under another load."""
    now = load_title(conditions)
    earlier = {load_title(known) for known in results.sessions.values()} - {now}
    if earlier:
        loads = ", ".join(sorted(load or "a load that was not recorded" for load in earlier))
        say(
            f"{results.path} has answers measured at {loads}; this run is at {now}. "
            "Reports keep their times apart."
        )


def load_tasks(
    task: BenchmarkTask, options: ClientOptions, *, concurrencies: Sequence[int]
) -> list[tuple[BenchmarkTask, ClientOptions]]:
    """One task per concurrency; each writes its own results file beside `task.out`."""
    out = task.out
    return [
        (
            replace(task, out=out.with_name(f"{out.stem}_c{number}{out.suffix or '.jsonl'}")),
            replace(options, concurrency=number),
        )
        for number in concurrencies
    ]


def sweep_tasks(
    task: BenchmarkTask, *, weights: Sequence[float | Mapping[str, float]], model: str
) -> list[BenchmarkTask]:
    """One task per guidance weight; each writes its own results file in the folder `task.out`.

    A mapping has the weights of several reward models by name.
    """
    tasks: dict[Path, BenchmarkTask] = {}
    for weight in weights:
        if isinstance(weight, Mapping):
            generation = replace(task.generation, weight=None, weights=dict(weight))
        else:
            generation = replace(task.generation, weight=weight)
        stem = re.sub(r"[^A-Za-z0-9._=+-]+", "_", f"{model}_w{weights_title(weight)}")
        out = task.out / f"{stem}.jsonl"
        # A weight may be given twice: a release with weight 0 has it twice in its recipe.
        tasks.setdefault(out, replace(task, out=out, generation=generation))
    return [*tasks.values()]


def weights_title(weight: float | Mapping[str, float]) -> str:
    """A guidance weight, or the weights of several reward models, in one word."""
    if isinstance(weight, Mapping):
        return "+".join(f"{name}={each:g}" for name, each in weight.items())
    return f"{weight:g}"


def judge_answers(
    results: Path, endpoint: ModelEndpoint, *, out: Path, options: ClientOptions
) -> RequestStats:
    """Have a judge model review every open answer of a results file; see `tita.bench.judge`."""
    items = list(judge_items(results))
    links = _links(endpoint, out=out)
    run: dict[str, Any] = {
        **{name: links[name] for name in ("model_digest", "model_root") if name in links},
        "model_name": endpoint.name,
        "model_id": endpoint.model.id,
        "judges": results.name,
        "max_new_tokens": _JUDGE_TOKENS,
        "temperature": 0.0,
    }
    prompts = {item.id: item.text for item in items}
    conditions = run_conditions(
        endpoint=endpoint.base_url, load=options.load(), options=options.others()
    )
    with ResultsFile(out, run=run, prompts=prompts, conditions=conditions) as file:
        return ask_endpoint(
            items, file, endpoint=endpoint, images=results.parent, run=run,
            generation=GenerationOptions(max_new_tokens=_JUDGE_TOKENS), options=options,
        )  # fmt: skip
