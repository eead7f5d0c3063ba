"""Asking a model in this process: the same results file, without a server."""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tita.align import Answer, Engine, Guidance, Request, Sampling
from tita.bench.endpoint import Reply
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import ResultsFile, answer_record
from tita.bench.worker_pool import RequestStats
from tita.errors import TitaError
from tita.terminal import progress
from tita.vlm import Models, load_vlm, model_digest, open_image

if TYPE_CHECKING:
    from tita.bench.tasks import BenchmarkTask


def run_local(
    task: "BenchmarkTask", *, name: str, base: str, reward: str | None, batch_size: int
) -> RequestStats:
    """Answer the questions of `task` that its results file does not hold yet.

    Questions are answered in batches, and the response time of each is its batch's: it is what the
    questioner waits for. A batch size of 1 measures a question alone.

    Args:
        name: what the results call the model.
        base: the model that answers; where `tita.vlm.load_vlm` finds it.
        reward: the model that steers it.

    Raises:
        TitaError: a weight without a reward model or the other way round, or a model that cannot be
            loaded.
    """
    weight = task.generation.weight
    if reward is not None and weight is None:
        raise TitaError("--reward without --weight", remedy="give --weight, such as 0.3")
    if reward is None and weight:
        raise TitaError(f"--weight {weight:g} without --reward", remedy="give --reward too")
    items = task.items()
    engine, links = _engine(base, reward)
    run = {**task.protocol(model_name=name), **links, "batch_size": batch_size}
    with ResultsFile(task.out, run=run) as results:
        return _ask(items, results, task=task, engine=engine, run=run, batch_size=batch_size)


# A sweep asks the same models once a weight.
@lru_cache(maxsize=1)
def _engine(base: str, reward: str | None) -> tuple[Engine, dict[str, str]]:
    """The models, and the names and digests by which results point at them."""
    base_model = load_vlm(base)
    links = {"base": base, "base_sha256": model_digest(base_model)}
    if reward is None:
        return Engine(Models(base_model)), links
    reward_model = load_vlm(reward)
    links |= {"reward": reward, "reward_sha256": model_digest(reward_model)}
    return Engine(Models(base_model, reward_model)), links


def _ask(
    items: Sequence[BenchmarkItem],
    results: ResultsFile,
    *,
    task: "BenchmarkTask",
    engine: Engine,
    run: dict[str, Any],
    batch_size: int,
) -> RequestStats:
    open_items = [item for item in items if item.id not in results.done]
    tally = RequestStats(num_kept=len(items) - len(open_items))
    started = time.perf_counter()
    with progress("asking", total=len(open_items), unit="questions") as advance:
        for batch in _batches(open_items, batch_size):
            before = time.perf_counter()
            requests = [_request(item, task=task) for item in batch]
            answers = engine.generate(requests)
            seconds = time.perf_counter() - before
            for item, answer in zip(batch, answers, strict=True):
                reply = _reply(answer, seconds=seconds)
                results.append(answer_record(item, reply, attempts=1, run=run))
            tally.num_asked += len(batch)
            rate = tally.num_asked / (time.perf_counter() - started)
            advance(len(batch), note=f"{rate:.1f}/s")
    tally.wall_s = time.perf_counter() - started
    return tally


def _batches(items: Sequence[BenchmarkItem], size: int) -> Iterator[Sequence[BenchmarkItem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _request(item: BenchmarkItem, *, task: "BenchmarkTask") -> Request:
    generation = task.generation
    return Request(
        question=item.text,
        images=tuple(open_image(task.images / image) for image in item.images),
        guidance=Guidance(weight=generation.weight or 0.0),
        sampling=Sampling(
            max_new_tokens=generation.max_new_tokens, temperature=generation.temperature
        ),
    )


def _reply(answer: Answer, *, seconds: float) -> Reply:
    num_output = len(answer.token_ids)
    return Reply(
        text=answer.text,
        finish_reason=answer.finish_reason,
        input_tokens=answer.num_prompt_tokens,
        output_tokens=num_output,
        total_tokens=answer.num_prompt_tokens + num_output,
        usage={"changed_tokens": answer.num_changed},
        response_time_s=seconds,
    )
