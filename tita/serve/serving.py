"""The server's state: what is loaded, what is running, and whether it still takes requests."""

import dataclasses
import logging
import time
from collections.abc import Callable

from tita.align import Engine, Request, Sampling
from tita.align.prefixes import PrefixCache
from tita.align.preparing import Preparer
from tita.align.stepper import Stepper, warm_up
from tita.serve import failures
from tita.serve.failures import Refusal
from tita.serve.metrics import Metrics
from tita.serve.options import ServeOptions
from tita.serve.preparing import prepare
from tita.serve.remote import Fetcher
from tita.serve.scheduler import Pending, Scheduler
from tita.terminal import say
from tita.vlm import VLM

logger = logging.getLogger(__name__)


class Serving:
    """One server from its first breath to its last; the HTTP side asks it for everything."""

    def __init__(self, options: ServeOptions, *, fetcher: Fetcher | None = None) -> None:
        self.options = options
        self.metrics = Metrics(options.name)
        self.fetcher = fetcher or Fetcher(hosts=options.image_hosts)
        self.created = int(time.time())
        self.guided = False
        self.draining = False
        self._preparer: Preparer | None = None
        self._scheduler: Scheduler | None = None

    def load(self, load_base: Callable[[], VLM], load_reward: Callable[[], VLM] | None) -> None:
        """Load both models, answer once, and be ready. Blocks."""
        base = _timed("base model", load_base)
        reward = _timed("reward model", load_reward) if load_reward else None
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
        self._preparer, self._scheduler = preparer, scheduler

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
        """Running and waiting."""
        return self._scheduler.num_requests if self._scheduler else 0

    def submit(self, request: Request, *, num_choices: int = 1) -> Callable[[], Pending]:
        """Run the prompt through the processors (blocks; call it in a thread).

        Returns:
            What queues the request, to be called on the event loop.
        """
        if self._preparer is None or self._scheduler is None:
            raise failures.loading()
        scheduler = self._scheduler
        prepared = prepare(self._preparer, request)
        choices = [
            dataclasses.replace(
                prepared,
                request=dataclasses.replace(
                    request,
                    sampling=dataclasses.replace(
                        request.sampling, seed=request.sampling.seed + index
                    ),
                ),
            )
            for index in range(num_choices)
        ]
        return lambda: scheduler.submit(choices)

    def stop(self) -> None:
        self.draining = True
        if self._scheduler is not None:
            self._scheduler.stop()


def _timed(what: str, load: Callable[[], VLM]) -> VLM:
    say(f"tita serve: loading the {what}")
    began = time.monotonic()
    vlm = load()
    num_millions = vlm.model.num_parameters() / 1e6
    took_s = time.monotonic() - began
    say(
        f"tita serve: {what} {vlm.name}: {num_millions:,.1f} million parameters "
        f"on {vlm.device} in {took_s:.1f} s"
    )
    return vlm


def _warm_up_request(*, guided: bool) -> Request:
    import PIL.Image

    image = PIL.Image.new("RGB", (64, 64))
    return Request(
        question="hello",
        images=(image,),
        weight=0.5 if guided else 0.0,
        sampling=Sampling(max_new_tokens=2),
    )
