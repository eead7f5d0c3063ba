"""Runs a benchmark task on a model in this process and writes the same results file."""

import gc
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tita.align import Answer, Guidance, Request, Sampling
from tita.bench.chat_response import Reply
from tita.bench.conditions import run_conditions
from tita.bench.methods import Method
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import ResultsFile, answer_record, count_by_suite
from tita.bench.tasks import BenchmarkTask, say_other_loads
from tita.bench.worker_pool import RequestStats
from tita.engine.engine_options import EngineName
from tita.engine.interface import AnswerEngine
from tita.engine.start import start_answer_engine
from tita.errors import TitaError
from tita.gang.gpus import require_gpus
from tita.records import IMAGE_MARK
from tita.settings import settings
from tita.terminal import progress
from tita.vlm.images import open_image
from tita.vlm.loading import load_vlm
from tita.vlm.model_set import digest_of
from tita.vlm.prompts import to_turns


def run_local(
    task: BenchmarkTask,
    *,
    name: str,
    base: str,
    reward: str | None,
    batch_size: int,
    rewards: Mapping[str, str] | None = None,
    engine_name: EngineName = "transformers",
) -> RequestStats:
    """Answer the questions of `task` that its results file has no answer to yet.

    Questions are answered in batches. The response time of a question is the time of its batch; use
    batch size 1 to measure single questions.

    Args:
        name: model name in the results file.
        base: base model, as `tita.vlm.loading.load_vlm` takes it.
        reward: reward model that guides the base model.
        batch_size: number of concurrent answers.
        rewards: several reward models by name, instead of `reward`.
        engine_name: the engine that runs the models.

    Raises:
        TitaError: only one of reward model and weight is given, or the weight of another reward
            model; an option is about endpoints; or a model cannot be loaded.
        NoDevice: this pod holds GPUs, and none is usable.
    """
    models = ({} if reward is None else {"reward": reward}) | dict(rewards or {})
    _guidance(task, tuple(models))
    if task.generation.overrides.record() or task.generation.fixed_length:
        raise TitaError(
            "--omit, --rename, --body and --ignore-eos change requests to an endpoint",
            where="--local-model",
            remedy="leave them out",
        )
    require_gpus(settings())
    items = task.items()
    engine, links = _SLOT.start({"base": base, **models}, engine_name)
    run = {**task.protocol(model_name=name), **links, "batch_size": batch_size}
    num_questions = count_by_suite(items)
    where = "in this process" if engine_name == "transformers" else "vLLM on this machine"
    conditions = run_conditions(endpoint=where, load={"batch_size": batch_size})
    with ResultsFile(
        task.out, run=run, images=task.image_files(items), conditions=conditions
    ) as results:
        say_other_loads(results, conditions)
        missing = [item for item in items if item.id not in results.done]
        other_images = _other_images(items, task=task)
        stats = RequestStats(num_kept=len(items) - len(missing))
        started = time.perf_counter()
        with progress("asking", total=len(missing), unit="questions") as advance:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                before = time.perf_counter()
                answers = _answer(
                    engine, batch, task=task, rewards=tuple(models), other_images=other_images
                )
                seconds = time.perf_counter() - before
                for item, answer in zip(batch, answers, strict=True):
                    reply = _reply(answer, seconds=seconds)
                    record = answer_record(
                        item, reply, attempts=1, run=run, num_questions=num_questions
                    )
                    results.append(record)
                    stats.count(record)
                rate = stats.num_asked / (time.perf_counter() - started)
                advance(len(batch), note=f"{rate:.1f}/s")
        stats.wall_s = time.perf_counter() - started
    return stats


class _EngineSlot:
    """The engine of the last run, since a sweep runs the same models once per weight.

    Another one is closed before the next starts: a GPU has memory for one.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._found: tuple[AnswerEngine, dict[str, str]] | None = None

    def start(
        self, names: Mapping[str, str], engine_name: EngineName
    ) -> tuple[AnswerEngine, dict[str, str]]:
        """The engine of these models, and their names and digests for the results file."""
        key = (*names.items(), engine_name)
        if self._found is None or self._key != key:
            self.clear()
            self._found = _start_engine(names, engine_name)
            self._key = key
        return self._found

    def clear(self) -> None:
        if self._found is not None:
            self._found[0].close()
            self._found = None
            gc.collect()


_SLOT = _EngineSlot()


def _start_engine(
    names: Mapping[str, str], engine_name: EngineName
) -> tuple[AnswerEngine, dict[str, str]]:
    links: dict[str, str] = {}
    for role, name in names.items():
        label = role if role in ("base", "reward") else f"reward_{role}"
        links |= {label: name, f"{label}_sha256": digest_of(name)}
    engine = start_answer_engine(names, lambda _, name: load_vlm(name), engine=engine_name)
    return engine, links


def _guidance(task: BenchmarkTask, rewards: Sequence[str]) -> Guidance:
    """Guidance of all requests, with reward models of these names.

    Raises:
        TitaError: only one of reward models and weights is given, or a name is unknown.
    """
    method = task.generation.method
    if method is not None:
        return _guidance_of(method, rewards)
    weight, weights = task.generation.weight, task.generation.weights
    if rewards and weight is None and not weights:
        raise TitaError("--reward without --weight", remedy="give --weight, such as 0.3")
    if not rewards and weight:
        raise TitaError(f"--weight {weight:g} without --reward", remedy="give --reward too")
    guidance = Guidance(weight=weight or 0.0, weights=weights)
    if weights:
        guidance.reward_weights(rewards)
    return guidance.among(rewards)


def _guidance_of(method: Method, rewards: Sequence[str]) -> Guidance:
    guidance = method.guidance()
    needs_reward = method.best_of > 1 or (not method.is_base and guidance.uses_rewards)
    if needs_reward and not rewards:
        raise TitaError(f"{method.name} without --reward", remedy="give --reward too")
    if method.weights:
        guidance.reward_weights(rewards)
    return guidance.among(rewards)


def _other_images(
    items: Sequence[BenchmarkItem], *, task: BenchmarkTask
) -> Mapping[str, tuple[str, ...]]:
    """For the control with other images: the images of another question, by question id.

    Questions exchange images in a circle with those that have the same number of images, and
    never the same ones where others exist.
    """
    method = task.generation.method
    if method is None or method.control != "other images":
        return {}
    others: dict[str, tuple[str, ...]] = {}
    by_number: dict[int, list[BenchmarkItem]] = {}
    for item in items:
        by_number.setdefault(len(item.images), []).append(item)
    for same in by_number.values():
        distinct = list(dict.fromkeys(item.images for item in same))
        following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
        others |= {item.id: following[item.images] for item in same}
    return others


def _answer(
    engine: AnswerEngine,
    batch: Sequence[BenchmarkItem],
    *,
    task: BenchmarkTask,
    rewards: Sequence[str],
    other_images: Mapping[str, tuple[str, ...]],
) -> list[Answer]:
    requests = [
        _request(item, task=task, rewards=rewards, reward_images=other_images.get(item.id))
        for item in batch
    ]
    number = task.generation.method.best_of if task.generation.method else 1
    if number == 1:
        return engine.generate(requests)
    best_of = getattr(engine, "best_of", None)
    if best_of is None:
        raise TitaError(
            f"best of {number} with engine vllm",
            remedy="give --engine transformers, or ask a server",
        )
    answers: list[Answer] = best_of(requests, number)
    return answers


def _request(
    item: BenchmarkItem,
    *,
    task: BenchmarkTask,
    rewards: Sequence[str],
    reward_images: tuple[str, ...] | None,
) -> Request:
    generation, method = task.generation, task.generation.method
    images = [open_image(task.images / image) for image in item.images]
    guidance = _guidance(task, rewards)
    temperature = generation.temperature
    sampling = Sampling(
        max_new_tokens=generation.max_new_tokens,
        temperature=temperature if method is None else method.temperature(temperature),
    )
    if reward_images is None:
        turns = to_turns(item.context, item.text, images)
        explain = method is not None and method.explain
        return Request(turns=turns, guidance=guidance, sampling=sampling, explain=explain)
    if item.context:
        raise TitaError(
            f"question {item.id} has earlier turns, which have no place for other images",
            remedy="run without --controls",
        )
    return Request(
        question=item.text.replace(IMAGE_MARK, ""),
        images=tuple(images),
        reward_images=tuple(open_image(task.images / image) for image in reward_images),
        guidance=guidance,
        sampling=sampling,
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
        changed=_changed(answer),
    )


def _changed(answer: Answer) -> list[tuple[int, int]]:
    """Start and end of the tokens that guidance changed, of an explained answer."""
    # The text has no end-of-text token, and no space before the first word.
    offset = "".join(token.text for token in answer.tokens).find(answer.text)
    if offset < 0 or not answer.text:
        return []
    ends = list(itertools.accumulate(len(token.text) for token in answer.tokens))
    changed = [
        (max(0, start - offset), min(len(answer.text), end - offset))
        for token, start, end in zip(answer.tokens, [0, *ends], ends, strict=False)
        if token.changed
    ]
    return [(start, end) for start, end in changed if start < end]
