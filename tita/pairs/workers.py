"""The workers of a run: which of them answers, and on which GPUs of its node."""

import os
from dataclasses import dataclass, replace

import torch

from tita.align import Engine
from tita.engine.engine_options import VllmOptions
from tita.engine.start import start_engine_of
from tita.errors import TitaError
from tita.pairs.distort import NoisyProcessor
from tita.recipes import PairsRecipe
from tita.storage import Store
from tita.vllm_plugin.outline import load_outline
from tita.vlm.loading import VLM, Models, load_vlm
from tita.vlm.model_set import digest_of, load_role


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One worker: a process, or with tensor parallelism the first of several that share a model."""

    number: int
    total: int
    """Number of workers of the run."""


def this_worker(recipe: PairsRecipe) -> Worker | None:
    """The worker that this process of torchrun is, which from now on sees its own GPUs only.

    None if this process has nothing to do, since its GPU belongs to the worker before it.

    Raises:
        TitaError: the processes of a node cannot be divided into workers.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = recipe.vllm.tensor_parallel_size
    if local_size % size:
        raise TitaError(
            f"vllm.tensor_parallel_size is {size}, and a node has {local_size} processes",
            where="recipe of build-pairs",
            remedy=f"give a multiple of {size} GPUs per node",
        )
    # Counted by NVML: CUDA is not initialised yet, and reads the variable when it is.
    if 1 < local_size <= (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[local_rank : local_rank + size])
    if rank % size:
        return None
    return Worker(number=rank // size, total=world_size // size)


def load_base(recipe: PairsRecipe, *, store: Store) -> VLM:
    """The base model, or for vLLM, which loads the weights itself, its outline.

    Raises:
        TitaError: it cannot be loaded.
    """
    if recipe.engine == "vllm":
        return load_outline(recipe.model, store=store, image_aspect=recipe.image_aspect)
    return load_vlm(recipe.model, store=store, dtype=recipe.dtype, image_aspect=recipe.image_aspect)


def digest_models(recipe: PairsRecipe, *, store: Store) -> dict[str, str]:
    """The digests of the models that a run loads, by role.

    Raises:
        TitaError: there is no such model.
    """
    names: dict[str, str] = {"base": recipe.model, **recipe.contrast.rewards}
    if recipe.reward is not None:
        names |= {"reward": recipe.reward.model, "reference": recipe.reward.reference}
    if recipe.teacher.model is not None:
        names["teacher"] = recipe.teacher.model
    return {role: digest_of(where, store=store) for role, where in names.items()}


def start_base_engine(base: VLM, recipe: PairsRecipe, *, store: Store | None = None) -> Engine:
    """The engine that answers with the base model, also about images with attached noise.

    With the reward models of `contrast`, if there are some.

    Raises:
        TitaError: a reward model cannot be loaded, or the engine cannot run the models.
    """
    vlms = {"base": base}
    for name, where in recipe.contrast.rewards.items():
        vlms[name] = load_role(
            name,
            where,
            loaded=vlms,
            load=lambda model: load_vlm(
                model, store=store, dtype=recipe.dtype, image_aspect=recipe.image_aspect
            ),
            store=store,
            image_aspect=recipe.image_aspect,
        )
    base = vlms.pop("base")
    noisy = Models(replace(base, processor=NoisyProcessor(base.processor)), more=vlms)
    given = recipe.vllm
    options = VllmOptions(
        dtype=recipe.dtype,
        max_batch=recipe.batch_size,
        tensor_parallel=given.tensor_parallel_size,
        max_model_len=given.max_model_len,
        memory_share=given.gpu_memory_utilization,
        compile=not given.enforce_eager,
    )
    return start_engine_of(noisy, engine=recipe.engine, vllm_options=options, store=store)
