"""The server's state: what is loaded, what is running, and whether it still takes requests."""

import asyncio
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.align.prompts import PreparedRequest, Preparer, PromptTooLong
from tita.align.requests import FORMS, REFERENCE_FORMS
from tita.serve import errors
from tita.serve.errors import APIError, too_long
from tita.serve.images import EncodedImage, ImageFetcher
from tita.serve.loading import LoadedModels
from tita.serve.metrics import Metrics
from tita.serve.options import ServeOptions
from tita.serve.prepare_queue import PrepareQueue
from tita.serve.scheduler import OutputQueue, Scheduler
from tita.serve.schemas import Checkpoint
from tita.terminal import say
from tita.vlm import BadConversation

if TYPE_CHECKING:
    from PIL.Image import Image


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request whose images have come, and are not unpacked yet."""

    num_characters: int
    """Of its words."""
    images: "tuple[EncodedImage, ...]"
    request: "Callable[[Sequence[Image]], Request]"
    """What is asked of the engine, with these images once they are unpacked."""

    @property
    def cost(self) -> int:
        """Roughly how long it takes to prepare, compared with others: the characters of its words.

        Unpacking and resizing a photograph takes about as long as tokenizing a twentieth of its
        bytes; and few bytes may unpack to many pixels.
        """
        return self.num_characters + sum(5000 + image.num_bytes // 20 for image in self.images)


def prepare(preparer: Preparer, asked: ParsedRequest) -> PreparedRequest:
    """The request with its inputs.

    Raises:
        APIError: an image is broken, the prompt is too long, or a model's template cannot say it.
    """
    request = asked.request([image.decoded() for image in asked.images])
    try:
        return preparer.prepare(request)
    except PromptTooLong as error:
        raise too_long(error.what) from None
    except BadConversation as error:
        raise APIError(error.what, param="messages", code="invalid_conversation") from None


class AsyncEngine:
    """One server from its first breath to its last; the HTTP side asks it for everything."""

    def __init__(self, options: ServeOptions, *, fetcher: ImageFetcher | None = None) -> None:
        self.options = options
        self.metrics = Metrics(options.name)
        self.fetcher = fetcher or ImageFetcher(hosts=options.image_hosts)
        self.created = int(time.time())
        self.guided = False
        self.base: Checkpoint | None = None
        self.reward: Checkpoint | None = None
        self.reference: Checkpoint | None = None
        self.context = 0
        """Tokens of prompt and answer together; these five are known once it is ready."""
        self.draining = False
        # A thread for each place in the queue: a host that sends its image slowly holds nobody up.
        self._fetchers = ThreadPoolExecutor(options.max_batch + options.max_waiting)
        self._turns: PrepareQueue[Preparer] | None = None
        self._scheduler: Scheduler | None = None

    def load(self, models: LoadedModels) -> None:
        """Answer once with these models, and be ready. Blocks.

        Raises:
            TitaError: their vocabularies share too little.
        """
        options = self.options
        engine = Engine(
            models.models,
            EngineOptions(
                prefill_tokens=options.prefill_tokens,
                prefix_cache_bytes=options.prefix_cache_bytes,
                max_drafts=options.max_drafts,
                pack=options.pack,
                max_prompt_tokens=options.limits.max_prompt_tokens,
            ),
        )
        batch, preparer = engine.new_batch(), engine.preparer
        took_s = sum(
            batch.warm_up(preparer.prepare(request)) for request in _warm_up_requests(models)
        )
        scheduler = Scheduler(batch, options=options, metrics=self.metrics)
        scheduler.start()
        self.guided = models.reward is not None
        self.base, self.reward, self.reference = models.checkpoints
        self.context = min(vlm.context_length for vlm in models.models.by_role().values())
        self._turns = PrepareQueue(_desks(preparer))
        self._scheduler = scheduler
        say(f"tita serve: warmed up in {took_s:.1f} s; ready")

    @property
    def forms(self) -> list[str]:
        """Guidance forms that can be asked for."""
        return [form for form in FORMS if self.reference or form not in REFERENCE_FORMS]

    @property
    def fingerprint(self) -> str:
        """Of the models: where it is the same, a seed gives the same answer."""
        models = (self.base, self.reward, self.reference)
        digests = [each.sha256 if each else "" for each in models]
        return f"fp_{hashlib.sha256(':'.join(digests).encode()).hexdigest()[:12]}"

    @property
    def closed(self) -> APIError | None:
        """Why no new request is taken right now, or None."""
        if self.draining:
            return errors.leaving()
        if self._scheduler is None:
            return errors.loading()
        return None if self._scheduler.alive else errors.broken()

    @property
    def healthy(self) -> bool:
        """Whether this process is worth keeping."""
        return self._scheduler is None or self.draining or self._scheduler.alive

    @property
    def num_requests(self) -> int:
        """Running, waiting, and being prepared."""
        return self._scheduler.num_requests if self._scheduler else 0

    async def ask(self, fetch: Callable[[], ParsedRequest], *, num_choices: int = 1) -> OutputQueue:
        """Queue a request.

        Args:
            fetch: waits for its images; called in a thread, once there is a place in the queue.
            num_choices: answers that are wanted, each with a seed of its own.

        Raises:
            APIError: the queue is full, something in the request cannot be done, or it is too late.
        """
        if self._turns is None or self._scheduler is None:
            raise errors.loading()
        claim = self._scheduler.claim(num_choices)
        try:
            # Once it is queued, the scheduler sees to its deadline.
            async with asyncio.timeout(self.options.deadline_s) as deadline:
                loop = asyncio.get_running_loop()
                asked = await loop.run_in_executor(self._fetchers, fetch)
                async with self._turns.turn(asked.cost) as turn:
                    prepared = await asyncio.to_thread(prepare, turn.desk, asked)
                    choices = [_reseeded(prepared, by=index) for index in range(num_choices)]
                    return claim.submit(choices, begun=turn.begun)
        except TimeoutError:
            if not deadline.expired():
                raise
            self.metrics.outcome("deadline")
            raise errors.too_late(self.options.deadline_s) from None
        finally:
            claim.release()

    def stop(self) -> None:
        self.draining = True
        if self._scheduler is not None:
            self._scheduler.stop()


def _desks(preparer: Preparer) -> list[Preparer]:
    """As many as leave most of the processors to the models."""
    number = min(max(2, (os.cpu_count() or 1) // 4), 4)
    return [preparer, *(preparer.clone() for _ in range(number - 1))]


def _reseeded(prepared: PreparedRequest, *, by: int) -> PreparedRequest:
    sampling = prepared.request.sampling
    sampling = dataclasses.replace(sampling, seed=sampling.seed + by)
    request = dataclasses.replace(prepared.request, sampling=sampling)
    return dataclasses.replace(prepared, request=request)


def _warm_up_requests(models: LoadedModels) -> list[Request]:
    """One for the models that all forms have, and one for the reference if there is one."""
    import PIL.Image

    image = PIL.Image.new("RGB", (64, 64))
    forms = ["tita"] if models.reference is None else ["tita", "dpo"]
    return [
        Request(
            question="hello",
            images=(image,),
            guidance=Guidance(weight=0.5 if models.reward else 0.0, form=form),
            sampling=Sampling(max_new_tokens=2),
        )
        for form in forms
    ]
