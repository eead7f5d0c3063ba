"""What chat and text completions share: checks, sampling, and the response, whole or streamed."""

import asyncio
import contextlib
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from tita.align import Guidance, Sampling, TokenOutput
from tita.json_text import dump_json
from tita.serve import errors
from tita.serve.async_engine import AsyncEngine
from tita.serve.errors import APIError, replace_surrogates
from tita.serve.request_fields import GenerationFields, StreamOptions
from tita.serve.scheduler import OutputQueue, PendingRequest
from tita.serve.schemas import ModelCard, PromptTokensDetails, Usage

logger = logging.getLogger(__name__)


def check_generation(
    body: GenerationFields, engine: AsyncEngine, *, num_prompts: int = 1
) -> Guidance:
    """Check the shared fields of a request; its guidance.

    Raises:
        APIError: the request is invalid or not supported.
    """
    guidance = engine.resolve_guidance(body.model, body)
    options, limits = engine.options, engine.options.limits
    max_choices = min(limits.max_choices, options.num_places)
    if (body.n or 1) * num_prompts > max_choices:
        times = "n" if num_prompts == 1 else "n times the number of prompts"
        raise APIError(f"{times} must be at most {max_choices}", param="n")
    if body.stream_options and not body.stream:
        raise APIError("stream_options requires stream", param="stream_options")
    return guidance


def check_length(
    body: GenerationFields, engine: AsyncEngine, *, max_new_tokens: int, param: str
) -> None:
    """Check the maximum and minimum number of output tokens; `param` is the maximum's field.

    Raises:
        APIError: the maximum is above the server's, or the minimum above the maximum.
    """
    allowed = engine.options.limits.max_output_tokens
    if max_new_tokens > allowed:
        raise APIError(f"{max_new_tokens} output tokens are more than {allowed}", param=param)
    if (body.min_tokens or 0) > max_new_tokens:
        raise APIError(
            f"min_tokens is {body.min_tokens}, more than {param}, {max_new_tokens}",
            param="min_tokens",
        )


def sampling_of(body: GenerationFields, *, max_new_tokens: int) -> Sampling:
    """The engine's sampling; the defaults of the fields that are not given are the engine's."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "repetition_penalty": body.repetition_penalty,
        "min_new_tokens": body.min_tokens,
    }
    return Sampling(
        max_new_tokens=max_new_tokens,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        ignore_end=bool(body.ignore_eos),
        stops=tuple(replace_surrogates(stop) for stop in body.stops),
        **{name: value for name, value in given.items() if value is not None},
    )


class OutputQueues:
    """The outputs of several prompts of one request, as of one prompt with several choices."""

    def __init__(self, queues: Sequence[OutputQueue]) -> None:
        self.queues = queues

    @property
    def requests(self) -> list[PendingRequest]:
        return [request for queue in self.queues for request in queue.requests]

    def outputs(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """As of `OutputQueue`; choices are numbered across the prompts.

        Raises:
            APIError: a choice failed; the others are cancelled.
        """
        # One queue, as of nearly every request, has nothing to merge.
        return self.queues[0].outputs() if len(self.queues) == 1 else self._merged()

    async def _merged(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        merged: asyncio.Queue[tuple[int, TokenOutput] | Exception] = asyncio.Queue()

        async def forward(queue: OutputQueue, first: int) -> None:
            try:
                async for index, output in queue.outputs():
                    merged.put_nowait((first + index, output))
            except Exception as error:
                merged.put_nowait(error)

        tasks, num_left = [], 0
        for queue in self.queues:
            tasks.append(asyncio.ensure_future(forward(queue, num_left)))
            num_left += len(queue.requests)
        try:
            while num_left:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                num_left -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Cancel the choices that are not complete."""
        for queue in self.queues:
            queue.cancel()


class CompletionWriter(ABC):
    """Reads the outputs of one request and writes its response, whole or as a stream."""

    id_prefix: str
    chunk_object: str

    def __init__(
        self, body: GenerationFields, queues: Sequence[OutputQueue], *, id: str, card: ModelCard
    ) -> None:
        # The body itself is not kept: its images are large.
        self.id = f"{self.id_prefix}-{id}"
        self.created = int(time.time())
        self.model = body.model
        self.fingerprint = card.system_fingerprint
        head = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        self._head = dump_json(head, ensure_ascii=False).removesuffix("}")
        """What all chunks begin with, as JSON."""
        self.stream_options = body.stream_options or StreamOptions()
        self.queue = OutputQueues(queues)
        self._first_choices = {queue.requests[0] for queue in queues}
        self._requests = self.queue.requests
        self.num_prompt_tokens = sum(
            request.prepared.num_prompt_tokens for request in self._first_choices
        )
        self.num_cached_tokens = 0
        self.num_tokens = 0
        self.num_changed = 0
        self.base_s = 0.0
        self.reward_s = 0.0
        self._started: set[int] = set()

    @abstractmethod
    def stream_choice(self, index: int, output: TokenOutput, *, first: bool) -> dict[str, Any]:
        """The choice that a chunk sends for a token; empty if there is nothing to send yet."""

    async def collect(self) -> list[list[TokenOutput]]:
        """All outputs of each choice."""
        outputs: list[list[TokenOutput]] = [[] for _ in self._requests]
        async for index, output in self.queue.outputs():
            self._count(index, output)
            outputs[index].append(output)
        self._log()
        return outputs

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. The status has been sent, so an error is an event too."""
        include_usage = bool(self.stream_options.include_usage)
        continuous = bool(self.stream_options.continuous_usage_stats)
        num_running, last = len(self._requests), b""
        try:
            async for index, output in self.queue.outputs():
                num_running -= output.finish_reason is not None
                first = self._count(index, output)
                if choice := self.stream_choice(index, output, first=first):
                    usage = {"usage": self.usage.model_dump()} if continuous else {}
                    no_usage = {"usage": None} if include_usage else {}
                    last = self._chunk([choice], **no_usage | usage)
                    if num_running:
                        yield last
                        last = b""
            if include_usage:
                last += self._chunk([], usage=self.usage.model_dump())
            self._log()
            # All that ends the stream is sent at once.
            yield last + b"data: [DONE]\n\n"
        except APIError as error:
            yield _sse(dump_json(error.body, ensure_ascii=False))
        except Exception:
            logger.exception("%s failed while streaming", self.id)
            yield _sse(dump_json(errors.internal_error().body, ensure_ascii=False))
        finally:
            self.queue.cancel()

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_tokens,
            total_tokens=self.num_prompt_tokens + self.num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
            changed_tokens=self.num_changed,
            base_ms=round(self.base_s * 1000, 3),
            reward_ms=round(self.reward_s * 1000, 3),
        )

    def _count(self, index: int, output: TokenOutput) -> bool:
        """Count a token; whether it is the first of its choice."""
        self.num_tokens += output.counted
        self.num_changed += output.changed
        self.base_s += output.base_s
        self.reward_s += output.reward_s
        first = index not in self._started
        self._started.add(index)
        if first and self._requests[index] in self._first_choices:
            self.num_cached_tokens += output.num_cached_tokens
        return first

    def _chunk(self, choices: list[dict[str, Any]], **usage: Any) -> bytes:
        rest = dump_json({"choices": choices} | usage, ensure_ascii=False).removeprefix("{")
        return _sse(f"{self._head}, {rest}")

    def _log(self) -> None:
        logger.info(
            "%s: %d prompt tokens, %d tokens, %d changed, %.0f ms base, %.0f ms reward",
            self.id, self.num_prompt_tokens, self.num_tokens,
            self.num_changed, self.base_s * 1000, self.reward_s * 1000,
        )  # fmt: skip


async def submit_all(submissions: Sequence[Any]) -> list[OutputQueue]:
    """The queues of several prompts that are submitted at once; if one fails, none is left."""
    tasks = [asyncio.ensure_future(submission) for submission in submissions]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, APIError):
                (await task).cancel()
        raise


def finite(logprob: float) -> float:
    """A log-probability as OpenAI's API has it, -9999 for impossible tokens; NaN stays."""
    return max(logprob, -9999.0)


def _sse(event: str) -> bytes:
    return f"data: {event}\n\n".encode("utf-8", "replace")
