"""Starts the engine that a command was given."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

from tita.align.engine import Engine
from tita.align.requests import EngineOptions
from tita.engine.engine_options import EngineName, VllmOptions
from tita.engine.interface import AnswerEngine, StepEngine
from tita.engine.transformers_batch import TransformersBatch
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.storage import Store
from tita.vllm_plugin.outline import load_outline, models_of
from tita.vlm.loading import VLM, Models
from tita.vlm.model_set import load_role


def require_engine(name: EngineName) -> None:
    """Check that the engine is installed.

    Raises:
        TitaError: it is not.
    """
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise TitaError("engine vllm is not installed", remedy="pip install 'tita[vllm]'")


def start_step_engine(
    name: EngineName,
    models: Models,
    *,
    engine_options: EngineOptions,
    vllm_options: VllmOptions,
    store: Store | None = None,
) -> StepEngine:
    """An engine that is stepped by its caller. Blocks.

    Args:
        name: of the engine.
        models: the loaded models; for vLLM their outlines.
        engine_options: of the transformers engine; `max_prompt_tokens` applies to both.
        vllm_options: `max_batch` applies to both.
        store: the store of models that are trees.

    Raises:
        TitaError: the models do not fit together, or the engine cannot run them.
    """
    if name == "transformers":
        engine = Engine(models, engine_options)
        return TransformersBatch(engine, max_batch=vllm_options.max_batch)
    # vLLM is installed only with the extra `vllm`.
    from tita.engine.vllm_engine import start_vllm

    return start_vllm(models, vllm_options, engine_options=engine_options, store=store)


def run_worker_node(
    models: Models,
    vllm_options: VllmOptions,
    *,
    engine_options: EngineOptions,
    store: Store | None = None,
) -> None:
    """Run the workers of a node that is not the first of an engine. Does not return.

    Args:
        models: outlines.
        vllm_options: with the node's rank.
        engine_options: those of the first node.
        store: the store of models that are trees.

    Raises:
        TitaError: the engine cannot run the models.
        LostPeer: a worker has ended.
    """
    from tita.engine.vllm_nodes import run_workers

    run_workers(models, vllm_options, engine_options=engine_options, store=store)


def start_engine_of(
    models: Models,
    *,
    engine: EngineName = "transformers",
    vllm_options: VllmOptions | None = None,
    store: Store | None = None,
) -> Engine:
    """An engine that answers lists of requests, with these models. Blocks.

    Args:
        models: the loaded models; for vLLM their outlines.
        engine: which one.
        vllm_options: of vLLM.
        store: the store of models that are trees.

    Raises:
        TitaError: the models do not fit together, or the engine cannot run them.
    """
    if engine == "transformers":
        # All adapters that were named may be used by one request.
        return Engine(models, EngineOptions(max_adapters=len(models.by_role())))
    from tita.engine.vllm_engine import VllmEngine, start_vllm

    return VllmEngine(start_vllm(models, vllm_options, store=store), models)


def start_answer_engine(
    names: Mapping[str, str | None],
    load: Callable[[str, str], VLM],
    *,
    engine: EngineName = "transformers",
    image_aspect: ImageAspect = "auto",
    vllm_options: VllmOptions | None = None,
) -> AnswerEngine:
    """An engine that answers lists of requests. Blocks.

    Args:
        names: of the models by role, or None; also of LoRA adapters.
        load: loads the model of a role with its weights, for the transformers engine.
        engine: which one.
        image_aspect: how images that are not square are resized, for vLLM.
        vllm_options: of vLLM.

    Raises:
        TitaError: a model cannot be loaded, the models do not fit together, or the engine cannot
            run them.
    """
    require_engine(engine)
    given = {role: name for role, name in names.items() if name is not None}
    vlms: dict[str, VLM] = {}
    for role, name in given.items():
        loader = (
            partial(load_outline, image_aspect=image_aspect)
            if engine == "vllm"
            else partial(load, role)
        )
        vlms[role] = load_role(role, name, loaded=vlms, load=loader, image_aspect=image_aspect)
    return start_engine_of(models_of(vlms), engine=engine, vllm_options=vllm_options)
