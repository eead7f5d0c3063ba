"""The engine behind the HTTP APIs: prepares requests and submits them to the scheduler."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import PIL.Image

from tita.align import Guidance, Request, Sampling
from tita.align.adapter_room import AdapterRoom
from tita.align.best_of import choices_of
from tita.align.forms import FORMS, UNGUIDED, VIEW_FORMS, Form
from tita.align.prompts import PreparedRequest, Preparer, PromptTooLong
from tita.engine.engine_options import ADAPTERS_PER_REQUEST
from tita.engine.interface import StepEngine
from tita.engine.start import start_step_engine
from tita.errors import TitaError
from tita.serve import errors
from tita.serve.api_keys import KEY_WEIGHTS, Weights
from tita.serve.errors import APIError
from tita.serve.images import EncodedImage
from tita.serve.metrics import Metrics
from tita.serve.model_loading import LoadedModels
from tita.serve.prepare_queue import PrepareQueue
from tita.serve.request_fields import GuidanceFields
from tita.serve.scheduler import OutputQueue, Scheduler
from tita.serve.schemas import ModelCard
from tita.serve.serve_options import ServeOptions
from tita.terminal import say
from tita.vlm.image_fetcher import ImageFetcher
from tita.vlm.loading import VLM
from tita.vlm.prompts import BadConversation

T = TypeVar("T")

_LINE_COST = 1_000
"""Up to this cost, which no image has, a request takes less than a millisecond to prepare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request whose images have been received and not decoded."""

    num_characters: int
    """Of its text."""
    images: tuple[EncodedImage, ...]
    build: Callable[[Sequence[PIL.Image.Image]], Request]
    """Creates the engine's request from the decoded images."""
    param: str = "messages"
    """The field of the request that has the prompt, for errors."""

    @property
    def cost(self) -> int:
        """Approximate preparation time, in characters of text.

        Decoding and resizing a photograph takes about as long as tokenizing a twentieth of its
        bytes as text, and a small file may have many pixels.
        """
        return self.num_characters + sum(5000 + image.num_bytes // 20 for image in self.images)


class AsyncEngine:
    """Models, queues and metrics of one server, for use on an event loop.

    It exists before its models are loaded; until then, `unavailable` is set.
    """

    def __init__(self, options: ServeOptions, *, fetcher: ImageFetcher | None = None) -> None:
        self.options = options
        self.metrics = Metrics(options.name)
        self.fetcher = fetcher or ImageFetcher(hosts=options.image_hosts)
        self.created = int(time.time())
        self.loaded: LoadedModels | None = None
        """The models, once all that they decide is known."""
        self.cards: dict[Hashable, ModelCard] = {}
        """Of the models, by name and default weights."""
        self.context = 0
        """Maximum number of tokens of prompt and response together; 0 until loaded."""
        self.draining = False
        """Set on SIGTERM: no new requests are accepted."""
        # One thread per place in the queue, so that a slow image host delays only its request.
        self._fetch_threads = ThreadPoolExecutor(options.num_places)
        self._prepare_queue: PrepareQueue[Preparer] | None = None
        self._scheduler: Scheduler | None = None
        self._step_engine: StepEngine | None = None

    def load(self, loaded: LoadedModels) -> None:
        """Warm up the models and become ready. Blocks.

        Raises:
            TitaError: the models' vocabularies share too few tokens.
        """
        models, options = loaded.models, self.options
        room = AdapterRoom(models, per_request=ADAPTERS_PER_REQUEST[options.engine_name])

        rewards = tuple(models.rewards)

        def check_room(weights: Weights) -> None:
            terms = self._guidance(weights, rewards).terms(rewards, has_images=True)
            used = [each for term in terms for each in (term.source, term.against)]
            room.check([each.name for each in used if each], what="the default guidance")

        # Twice: vLLM takes minutes to start, and transformers' engine sets how many fit.
        check_room({})
        options.keys.add_check(check_room)
        engine = start_step_engine(
            options.engine_name,
            models,
            engine_options=options.engine,
            vllm_options=dataclasses.replace(options.vllm, max_batch=options.max_batch),
        )
        preparer = engine.preparer
        say(f"tita serve: {engine.capabilities.describe()}")
        check_room({})
        options.keys.check()
        # One warm-up request runs base and reward models, the other the reference model too.
        weights = dict.fromkeys(_distinct(models.rewards), 0.5)
        guidances = [Guidance(weights=weights) if weights else UNGUIDED]
        if models.reference is not None:
            guidances.append(Guidance(weights=weights, form="dpo"))
        warm_up_s = 0.0
        for guidance in guidances:
            request = Request(
                question="hello",
                images=(PIL.Image.new("RGB", (64, 64)),),
                guidance=guidance,
                sampling=Sampling(max_new_tokens=2),
            )
            warm_up_s += _warm_up(engine, preparer.prepare(request))
        scheduler = Scheduler(engine, options=self.options, metrics=self.metrics)
        scheduler.start()
        self.context = preparer.context_length
        # A quarter of the CPU cores, two to four, prepares requests; the others are for the models.
        num_preparers = min(max(2, (os.cpu_count() or 1) // 4), 4)
        clones = (preparer.clone() for _ in range(num_preparers - 1))
        self._prepare_queue = PrepareQueue([preparer, *clones])
        self._step_engine = engine
        self.loaded = loaded
        # From here on, requests are accepted.
        self._scheduler = scheduler
        say(f"tita serve: warmed up in {warm_up_s:.1f} s; ready")

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the reward models."""
        return () if self.loaded is None else tuple(self.loaded.models.rewards)

    @property
    def forms(self) -> list[str]:
        """Guidance forms that the models and the engine support."""
        has_reference = self.loaded is not None and self.loaded.models.reference is not None
        return [
            name
            for name, form in self._engine_forms.items()
            if (self.rewards or not form.uses_rewards)
            and (has_reference or not form.needs_reference)
        ]

    @property
    def _engine_forms(self) -> dict[str, Form]:
        """Guidance forms that the engine supports."""
        engine = self._step_engine
        views = engine is None or engine.capabilities.views
        return {name: form for name, form in FORMS.items() if views or name not in VIEW_FORMS}

    @property
    def view_forms(self) -> list[str]:
        """Guidance forms that need the base model alone."""
        return [name for name, form in self._engine_forms.items() if not form.uses_rewards]

    @property
    def default_guidance(self) -> Guidance:
        """Guidance of requests that do not specify it, as the models allow.

        While a request is answered, with the default weights of its API key.
        """
        return self._guidance(KEY_WEIGHTS.get(), self.rewards)

    def _guidance(self, weights: Weights, rewards: Sequence[str]) -> Guidance:
        """The default guidance with the default weights of a key, if it has some."""
        given = self.options.guidance
        return dataclasses.replace(given, weights=weights) if weights else given.among(rewards)

    @property
    def unavailable(self) -> APIError | None:
        """The error for new requests, or None if they are accepted."""
        if self.draining:
            return errors.shutting_down()
        if self._scheduler is None:
            return errors.loading()
        return None if self._scheduler.alive else errors.internal_error()

    @property
    def healthy(self) -> bool:
        """Whether the process can continue; False if the scheduler died or its device is lost."""
        return self._scheduler is None or self.draining or self._scheduler.healthy

    @property
    def num_requests(self) -> int:
        """Running requests, waiting requests, and those being prepared."""
        return self._scheduler.num_requests if self._scheduler else 0

    def resolve_guidance(self, model: str, fields: GuidanceFields) -> Guidance:
        """The guidance of a request for `model`; the server's default for values not given.

        A form that uses no reward model has defaults of its own, unless it is the server's.

        Raises:
            APIError: there is no such model, form or reward model, or the model cannot be guided.
        """
        default = self.default_guidance
        weight, weights = fields.guidance_weight, fields.guidance_weights
        steers = bool(weight) or any((weights or {}).values())
        if self._is_base(model):
            if steers or fields.guidance_form in self.view_forms:
                raise APIError(
                    f"model {model!r} is not guided; use {self.options.name!r}",
                    param="guidance_weight",
                )
            weight, weights = 0.0, None
        form = fields.guidance_form or default.form
        self._check_form(form, steers=steers)
        if form != default.form and (form in self.view_forms or not default.uses_rewards):
            default = Guidance.of(form=form) if form in self.forms else UNGUIDED
        if weight is not None and weights is not None:
            raise APIError(
                "guidance_weight beside guidance_weights; send one", param="guidance_weights"
            )
        if weights is not None and not weights and FORMS[form].uses_rewards:
            weight = 0.0  # that of all reward models, since none is named
        elif weight is None and not weights:
            weight, weights = default.weight, dict(default.weights)
        bound, same = fields.guidance_plausibility, form == default.form
        if bound is None:
            # A contrast without a bound raises tokens that the base finds absurd.
            own = 0.0 if same else FORMS[form].plausibility
            bound = own or default.plausibility
        settings = {name: getattr(default, name) for name in FORMS[form].settings if same}
        given = {"noise_step": fields.guidance_noise_step, "contrast": fields.guidance_contrast}
        settings |= {name: value for name, value in given.items() if value is not None}
        try:
            guidance = Guidance.of(
                form=form,
                weight=weight,
                weights=weights,
                plausibility=bound,
                text=fields.guidance_text,
                **settings,
            )
            guidance.reward_weights(self.rewards)
        except TitaError as error:
            asked = {**given, "text": fields.guidance_text}
            names = [name for name in asked if asked[name] is not None and name in error.what]
            names += ["weights" if weights else "weight"]
            raise APIError(str(error), param=f"guidance_{names[0]}") from None
        return guidance

    def _is_base(self, model: str) -> bool:
        """Whether a request names the base model alone.

        Raises:
            APIError: there is no such model.
        """
        served = (self.options.name, self.options.base_name)
        if model not in served:
            raise errors.model_not_found(model, served=served)
        return model == self.options.base_name

    def _check_form(self, form: str, *, steers: bool) -> None:
        """Check that the models support a form; without guidance, any form is the base alone.

        Raises:
            APIError: there is no such form, or no model for it.
        """
        alone = not self.rewards and not steers
        if form in self.forms or (form in self._engine_forms and alone):
            return
        if form in self._engine_forms and not self.rewards:
            raise APIError("the server has no reward model", param="guidance_weight")
        raise APIError(
            f"guidance form {form!r} is not available; choose from {', '.join(self.forms)}",
            param="guidance_form",
        )

    async def submit(
        self, request: ParsedRequest | Callable[[], ParsedRequest], *, num_choices: int = 1
    ) -> OutputQueue:
        """Prepare and queue a request.

        Args:
            request: or a function that fetches its images and decodes their base64; it is called
                in a thread after a place in the queue is reserved.
            num_choices: number of responses, each with its own seed.

        Raises:
            APIError: the queue is full, the request is invalid, or its deadline has passed.
        """
        if self._prepare_queue is None or self._scheduler is None:
            raise errors.loading()
        reservation = self._scheduler.reserve(num_choices)
        try:
            # The scheduler enforces the deadline of queued requests.
            async with asyncio.timeout(self.options.deadline_s) as deadline:
                parsed = await self._parsed(request)
                async with self._prepare_queue.slot(parsed.cost) as (preparer, mark_started):
                    # To hand a line of text to a thread takes longer than to tokenize it.
                    is_line = parsed.cost <= _LINE_COST
                    prepared = (
                        _prepare(preparer, parsed)
                        if is_line
                        else await asyncio.to_thread(_prepare, preparer, parsed)
                    )
                    choices = choices_of(prepared, num_choices)
                    return self._scheduler.submit(reservation, choices, mark_started=mark_started)
        except TimeoutError:
            if not deadline.expired():
                raise
            self.metrics.count_request("deadline")
            raise errors.deadline_exceeded(self.options.deadline_s) from None
        finally:
            self._scheduler.release(reservation)

    async def call_preparer(
        self,
        request: ParsedRequest | Callable[[], ParsedRequest],
        work: Callable[[Preparer, ParsedRequest], T],
    ) -> T:
        """Run `work` with a request in its turn among the requests that are prepared.

        Args:
            request: as of `submit`.
            work: called in a thread.

        Raises:
            APIError: the queue is full, the request is invalid, or its deadline has passed.
        """
        if self._prepare_queue is None or self._scheduler is None:
            raise errors.loading()
        reservation = self._scheduler.reserve(1)
        try:
            async with asyncio.timeout(self.options.deadline_s):
                parsed = await self._parsed(request)
                async with self._prepare_queue.slot(parsed.cost) as (preparer, mark_started):
                    try:
                        return await asyncio.to_thread(work, preparer, parsed)
                    except BadConversation as error:
                        raise _invalid_conversation(error, parsed) from None
                    finally:
                        mark_started()
        except TimeoutError:
            raise errors.deadline_exceeded(self.options.deadline_s) from None
        finally:
            self._scheduler.release(reservation)

    async def _parsed(self, request: ParsedRequest | Callable[[], ParsedRequest]) -> ParsedRequest:
        if isinstance(request, ParsedRequest):
            return request
        return await asyncio.get_running_loop().run_in_executor(self._fetch_threads, request)

    def stop(self) -> None:
        """Stop accepting requests and end the scheduler; unfinished requests fail."""
        self.draining = True
        if self._scheduler is not None:
            self._scheduler.stop()
        if self._step_engine is not None:
            self._step_engine.close()


def _prepare(preparer: Preparer, parsed: ParsedRequest) -> PreparedRequest:
    """Decode the images and tokenize the prompt; the result does not hold the images.

    Raises:
        APIError: an image is invalid, the prompt is too long, or a model's chat template does not
            support the conversation.
    """
    request = parsed.build([image.decode() for image in parsed.images])
    try:
        prepared = preparer.prepare(request)
    except PromptTooLong as error:
        raise errors.context_length_exceeded(error.what, param=parsed.param) from None
    except BadConversation as error:
        raise _invalid_conversation(error, parsed) from None
    # A photograph takes 36 MB while its request waits, and the models only read its inputs.
    spent = dataclasses.replace(
        request, question="", images=(), turns=(), raw=None, token_ids=(), reward_images=None
    )
    return dataclasses.replace(prepared, request=spent)


def _invalid_conversation(error: BadConversation, parsed: ParsedRequest) -> APIError:
    return APIError(error.what, param=parsed.param, code="invalid_conversation")


def _distinct(rewards: Mapping[str, VLM]) -> list[str]:
    """Names of reward models with weights of their own: of those that share them, the first."""
    found: dict[int, str] = {}
    for name, vlm in rewards.items():
        found.setdefault(id(vlm.model), name)
    return [*found.values()]


def _warm_up(engine: StepEngine, prepared: PreparedRequest) -> float:
    """Answer a request, so that no client waits for lazy set-up; returns the seconds.

    Raises:
        TitaError: the models cannot answer it.
    """
    began = time.perf_counter()
    engine.admit("warm-up", prepared)
    while len(engine):
        for _, outcome in engine.step():
            if isinstance(outcome, TitaError):
                raise outcome
    return time.perf_counter() - began
