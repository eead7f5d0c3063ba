"""Starts vLLM with the combined model, and answers requests with it."""

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image
from vllm import EngineArgs, LLMEngine
from vllm.triton_utils import HAS_TRITON

from tita.align.engine import Engine
from tita.align.forms import UNGUIDED, Guidance
from tita.align.prompts import PreparedRequest, Preparer
from tita.align.requests import EngineOptions, Request
from tita.align.vocabulary import Vocabulary, match_vocabularies
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_adapters import ServedAdapters, adapter_roles, served_adapters
from tita.engine.vllm_batch import VllmBatch
from tita.engine.vllm_drafts import RUNNER_V2, draft_args
from tita.engine.vllm_inputs import to_engine_input
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.storage import Store
from tita.vllm_plugin import STARTED_BY_TITA
from tita.vllm_plugin.families import Family, config_overrides, family_of
from tita.vllm_plugin.outline import load_outline, models_of, saved_dtype
from tita.vlm.inputs import image_token_id, prepare_alike
from tita.vlm.loading import VLM, Models, locate_model
from tita.vlm.model_set import load_role

_PROCESSORS = {
    "0": "tita.vllm_plugin.logits_processors:GuidanceRows",
    "1": "tita.vllm_plugin.logits_processors:RequestCheck",
}
"""Logits processor by the value of this variable."""


class EveryModelPreparer(Preparer):
    """Prepares every request for all models, also for those that its guidance does not need.

    All models run for every request in vLLM, and their KV is shared between requests.
    """

    def __init__(self, models: Models, options: EngineOptions | None, **how: Any) -> None:
        super().__init__(models, options, **how)
        self._all = guidance_of_all(models)
        self._reward_names = list(models.rewards)

    def prepare(self, request: Request) -> PreparedRequest:
        return self._as_asked(super().prepare(self._for_all(request)), request)

    def prepare_all(self, requests: Sequence[Request]) -> list[PreparedRequest | TitaError]:
        found = super().prepare_all([self._for_all(request) for request in requests])
        return [
            each if isinstance(each, TitaError) else self._as_asked(each, request)
            for each, request in zip(found, requests, strict=True)
        ]

    def _for_all(self, request: Request) -> Request:
        return dataclasses.replace(request, guidance=self._all)

    def _as_asked(self, prepared: PreparedRequest, request: Request) -> PreparedRequest:
        has_images = bool(request.prompt.pictures)
        terms = request.guidance.terms(self._reward_names, has_images=has_images)
        # The images are open in the prepared request.
        asked = dataclasses.replace(prepared.request, guidance=request.guidance)
        return dataclasses.replace(prepared, request=asked, terms=terms)


class VllmEngine(Engine):
    """Answers requests with vLLM; methods as of `tita.align.Engine`. Not thread-safe."""

    def __init__(self, batch: VllmBatch, models: Models) -> None:
        self.models = models
        self.options = EngineOptions()
        self.preparer = batch.preparer
        self._batch = batch

    def new_batch(self) -> Any:
        """The batch of this engine: vLLM has one."""
        self._batch.clear()
        return self._batch

    def close(self) -> None:
        """End vLLM's processes."""
        self._batch.close()


def load_outlines(
    paths: dict[str, str], *, store: Store | None = None, image_aspect: ImageAspect = "auto"
) -> Models:
    """Outlines of the models by role, `base` first; of LoRA adapters on those of their models."""
    found: dict[str, VLM] = {}
    for role, path in paths.items():
        found[role] = load_role(
            role,
            path,
            loaded=found,
            load=partial(load_outline, store=store, image_aspect=image_aspect),
            store=store,
            image_aspect=image_aspect,
        )
    return models_of(found)


def guidance_of_all(models: Models) -> Guidance:
    """Guidance for which every model has to run."""
    if not models.rewards:
        return UNGUIDED
    form = "tita" if models.reference is None else "dpo"
    return Guidance(weights=dict.fromkeys(models.rewards, 1.0), form=form)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What is known of an engine before vLLM is started."""

    args: EngineArgs
    family: Family
    """Of all models."""
    preparer: Preparer
    vocabularies: Mapping[str, Vocabulary]
    """The maps of models whose tokens differ from the base's."""
    adapters: ServedAdapters | None


def set_up(
    models: Models,
    options: VllmOptions,
    *,
    engine_options: EngineOptions | None = None,
    store: Store | None = None,
) -> EngineSetup:
    """Check that vLLM can run these models, and set its environment.

    Args:
        models: outlines.
        options: of vLLM.
        engine_options: `max_prompt_tokens` and `max_adapters` apply.
        store: the store of models that are trees.

    Raises:
        TitaError: vLLM does not support these models together.
    """
    adapted = adapter_roles(models)
    # Adapters share the model of the first.
    vlms = {role: vlm for role, vlm in models.by_role().items() if role not in adapted[1:]}
    configs = {role: vlm.model.config for role, vlm in vlms.items()}
    paths = {role: _whole_model(vlm, store=store) for role, vlm in vlms.items()}
    names = {role: vlm.name for role, vlm in vlms.items()}
    family = family_of(configs["base"], where=names["base"])
    overrides = config_overrides(configs, paths, names=names, adapters=adapted)
    steering = [role for role in vlms if role != "base"]
    number = steering.index(adapted[0]) if adapted else 0
    adapters = served_adapters(models, family, module_number=number)
    vocabularies = match_vocabularies(models).maps
    # All models run for every request, also those that its guidance does not need.
    longest = min(vlm.context_length for vlm in vlms.values())
    longest = min(options.max_model_len or longest, longest)
    engine_options = dataclasses.replace(engine_options or EngineOptions(), max_model_len=longest)
    alike = all(prepare_alike(models.base, vlm) for vlm in vlms.values())
    preparer = (Preparer if alike else EveryModelPreparer)(
        models, engine_options, vocabularies=vocabularies
    )
    # Of any length: whether an image fits into the context is for vLLM to say.
    _check_prompts(Preparer(models, vocabularies=vocabularies), family, models, vocabularies)
    _set_environment(options)
    args = _engine_args(options, configs["base"], paths["base"], overrides, longest)
    if options.max_drafts:
        drafting = draft_args(
            models, options, overrides, family=family, paths=paths, vocabularies=vocabularies
        )
        args = dataclasses.replace(args, **drafting)
    if adapters is not None:
        max_loaded = engine_options.max_adapters
        args = dataclasses.replace(args, **adapters.engine_args(max_loaded=max_loaded))
    return EngineSetup(
        args=args,
        family=family,
        preparer=preparer,
        vocabularies=vocabularies,
        adapters=adapters,
    )


def _whole_model(vlm: VLM, *, store: Store | None) -> str:
    """Folder or hub name of a model, or of the one that an adapter belongs to."""
    if vlm.adapters is not None:
        return vlm.adapters.source
    return locate_model(vlm.name, store=store)


@contextmanager
def translate_start_errors(models: Models) -> Iterator[None]:
    """Translate what vLLM raises when it starts.

    Raises:
        TitaError: vLLM cannot start.
    """
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TitaError(
            f"vLLM cannot start ({reason})",
            where=models.base.name,
            remedy="see its log above, or choose --engine transformers",
        ) from error


def start_vllm(
    models: Models,
    options: VllmOptions | None = None,
    *,
    engine_options: EngineOptions | None = None,
    store: Store | None = None,
) -> VllmBatch:
    """Start vLLM with these models. Blocks.

    Args as of `set_up`.

    Raises:
        TitaError: vLLM does not support these models together, or cannot load them.
    """
    setup = set_up(models, options or VllmOptions(), engine_options=engine_options, store=store)
    others = set(multiprocessing.active_children())
    with translate_start_errors(models):
        engine = LLMEngine.from_engine_args(setup.args)
    batch = VllmBatch(
        engine,
        models,
        family=setup.family,
        preparer=setup.preparer,
        vocabularies=setup.vocabularies,
        adapters=None if setup.adapters is None else setup.adapters.requests,
        drafts=setup.args.speculative_config is not None,
        processes=set(multiprocessing.active_children()) - others,
    )
    if setup.adapters is not None:
        _check_adapters(batch, setup.adapters, models)
    return batch


def _check_adapters(batch: VllmBatch, adapters: ServedAdapters, models: Models) -> None:
    """Check that vLLM changes every layer that an adapter does; it would leave others out.

    Raises:
        TitaError: it does not.
    """
    missing = adapters.layers - batch.adapted_layers()
    if missing:
        batch.close()
        raise TitaError(
            f"vLLM applies no adapter to {min(missing)}",
            where=models.base.name,
            remedy="give the merged model, or choose --engine transformers",
        )


def _check_prompts(
    preparer: Preparer, family: Family, models: Models, vocabularies: Mapping[str, Vocabulary]
) -> None:
    """Check before the weights are loaded that all models read the same tokens.

    Raises:
        DifferentPrompts: they do not.
    """
    for size in ((64, 64), (96, 32)):
        question = Request(
            question="What is it?",
            images=(PIL.Image.new("RGB", size),),
            guidance=guidance_of_all(models),
        )
        to_engine_input(
            preparer.prepare(question),
            family=family,
            image_token=image_token_id(models.base.model),
            vocabularies=vocabularies,
            adapters=adapter_roles(models),
        )


def _set_environment(options: VllmOptions) -> None:
    """Settings that vLLM reads from the environment only; others that are set already stay.

    Raises:
        TitaError: the environment asks for a model runner that vLLM does not have here.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(options.processes))
    runner = os.environ.setdefault(RUNNER_V2, "0")
    if runner not in _PROCESSORS:
        raise TitaError(f"{RUNNER_V2} is {runner!r}", remedy="set it to 0 or 1")
    if runner == "1" and not HAS_TRITON:
        raise TitaError(
            f"{RUNNER_V2} is set, and vLLM has no Triton for this device",
            remedy="unset it: model runner V1 needs none",
        )
    # Forking a process that has threads, such as a server's, may deadlock.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ[STARTED_BY_TITA] = "1"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _engine_args(
    options: VllmOptions, config: Any, base: str, overrides: dict[str, Any], longest: int
) -> EngineArgs:
    more: dict[str, Any] = {}
    if options.prefill_tokens is not None:
        more["max_num_batched_tokens"] = options.prefill_tokens
    if options.block_size is not None:
        more["block_size"] = options.block_size
    if options.num_nodes > 1:
        more |= {
            "nnodes": options.num_nodes,
            "node_rank": options.node_rank,
            "master_addr": options.leader_address,
            "master_port": options.leader_port,
            "distributed_executor_backend": "mp",
        }
    if options.kv_cache_bytes is not None:
        more["kv_cache_memory_bytes"] = options.kv_cache_bytes
    return EngineArgs(
        model=base,
        hf_overrides=overrides,
        # vLLM's own `auto` would make float32 weights shorter.
        dtype=saved_dtype(config) if options.dtype == "auto" else options.dtype,
        max_model_len=longest,
        max_num_seqs=options.max_batch,
        tensor_parallel_size=options.tensor_parallel,
        pipeline_parallel_size=options.pipeline_parallel,
        gpu_memory_utilization=options.memory_share,
        enable_prefix_caching=options.prefix_cache,
        enforce_eager=not options.compile,
        logits_processors=[_PROCESSORS[os.environ[RUNNER_V2]]],
        worker_extension_cls="tita.vllm_plugin.worker_methods.WorkerMethods",
        # Images are prepared here, once. vLLM would normalise pixels again on the device, by mean
        # and deviation in preprocessor_config.json.
        mm_processor_cache_gb=0,
        mm_device_do_normalize=False,
        # Sampling is the request's alone.
        generation_config="vllm",
        **more,
    )
