"""The server's state: what is loaded, what is running, and whether it still takes requests."""

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tita.align import Engine, Request, Sampling
from tita.align.prefixes import PrefixCache
from tita.align.preparing import Prepared, Preparer, context_length
from tita.align.stepper import Stepper, warm_up
from tita.serve import failures
from tita.serve.failures import Refusal
from tita.serve.loading import Loaded
from tita.serve.metrics import Metrics
from tita.serve.options import ServeOptions
from tita.serve.preparing import cost, prepare
from tita.serve.remote import Fetcher
from tita.serve.scheduler import Scheduler
from tita.serve.schemas import Checkpoint
from tita.serve.tickets import Pending
from tita.serve.turns import Turns
from tita.terminal import say

logger = logging.getLogger(__name__)


class Serving:
    """One server from its first breath to its last; the HTTP side asks it for everything."""

    def __init__(self, options: ServeOptions, *, fetcher: Fetcher | None = None) -> None:
        self.options = options
        self.metrics = Metrics(options.name)
        self.fetcher = fetcher or Fetcher(hosts=options.image_hosts)
        self.created = int(time.time())
        self.guided = False
        self.base: Checkpoint | None = None
        self.reward: Checkpoint | None = None
        self.context = 0
        """Tokens of prompt and answer together; these four are known once it is ready."""
        self.draining = False
        # A thread for each place in the queue: a host that sends its image slowly holds nobody up.
        self._readers = ThreadPoolExecutor(options.max_batch + options.max_waiting)
        self._turns = Turns()
        self._preparer: Preparer | None = None
        self._scheduler: Scheduler | None = None

    def load(
        self, load_base: Callable[[], Loaded], load_reward: Callable[[], Loaded] | None
    ) -> None:
        """Load both models, answer once, and be ready. Blocks."""
        loaded = load_base()
        loaded_reward = load_reward() if load_reward else None
        base, reward = loaded.vlm, loaded_reward.vlm if loaded_reward else None
        # The engine's own check that both know the same tokens, and the form.
        Engine(base, reward, form=self.options.form)
        stepper = Stepper(
            base,
            reward,
            form=self.options.form,
            prefill_tokens=self.options.prefill_tokens,
            prefixes=PrefixCache(self.options.prefix_cache_bytes),
        )
        preparer = Preparer(base, reward, max_prompt_tokens=self.options.limits.max_prompt_tokens)
        took_s = warm_up(stepper, preparer.prepare(_warm_up_request(guided=reward is not None)))
        say(f"tita serve: warmed up in {took_s:.1f} s; ready")
        scheduler = Scheduler(stepper, options=self.options, metrics=self.metrics)
        scheduler.start()
        self.guided = reward is not None
        self.base = loaded.checkpoint
        self.reward = loaded_reward.checkpoint if loaded_reward else None
        self.context = min(context_length(vlm) for vlm in (base, reward) if vlm is not None)
        self._preparer, self._scheduler = preparer, scheduler

    @property
    def fingerprint(self) -> str:
        """Of both models: where it is the same, a seed gives the same answer."""
        digests = [each.sha256 if each else "" for each in (self.base, self.reward)]
        return f"fp_{hashlib.sha256(':'.join(digests).encode()).hexdigest()[:12]}"

    @property
    def closed(self) -> Refusal | None:
        """Why no new request is taken right now, or None."""
        if self.draining:
            return failures.leaving()
        if self._scheduler is None:
            return failures.loading()
        return None if self._scheduler.alive else failures.broken()

    @property
    def healthy(self) -> bool:
        """Whether this process is worth keeping."""
        return self._scheduler is None or self.draining or self._scheduler.alive

    @property
    def num_requests(self) -> int:
        """Running, waiting, and being prepared."""
        return self._scheduler.num_requests if self._scheduler else 0

    async def ask(self, read: Callable[[], Request], *, num_choices: int = 1) -> Pending:
        """Queue a request.

        Args:
            read: takes in its images; called in a thread, once there is a place in the queue.
            num_choices: answers that are wanted, each with a seed of its own.

        Raises:
            Refusal: the queue is full, or something in the request cannot be done.
        """
        if self._preparer is None or self._scheduler is None:
            raise failures.loading()
        preparer = self._preparer
        claim = self._scheduler.claim(num_choices)
        try:
            loop = asyncio.get_running_loop()
            request = await loop.run_in_executor(self._readers, read)
            async with self._turns.turn(cost(request)):
                prepared = await asyncio.to_thread(prepare, preparer, request)
            return claim.submit([_reseeded(prepared, by=index) for index in range(num_choices)])
        finally:
            claim.release()

    def stop(self) -> None:
        self.draining = True
        if self._scheduler is not None:
            self._scheduler.stop()


def _reseeded(prepared: Prepared, *, by: int) -> Prepared:
    sampling = prepared.request.sampling
    sampling = dataclasses.replace(sampling, seed=sampling.seed + by)
    request = dataclasses.replace(prepared.request, sampling=sampling)
    return dataclasses.replace(prepared, request=request)


def _warm_up_request(*, guided: bool) -> Request:
    import PIL.Image

    image = PIL.Image.new("RGB", (64, 64))
    return Request(
        question="hello",
        images=(image,),
        weight=0.5 if guided else 0.0,
        sampling=Sampling(max_new_tokens=2),
    )
