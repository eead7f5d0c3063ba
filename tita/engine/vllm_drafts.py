"""Which models can draft on vLLM, and the settings with which vLLM drafts."""

import os
from collections.abc import Mapping
from typing import Any

from tita.align.vocabulary import Vocabulary
from tita.engine.engine_options import VllmOptions
from tita.errors import TitaError
from tita.vllm_plugin.families import DraftOverrides, Family, draft_name
from tita.vlm.inputs import image_token_id
from tita.vlm.loading import VLM, Models

RUNNER_V2 = "VLLM_USE_V2_MODEL_RUNNER"
"""Environment variable that chooses vLLM's model runner, V1 or V2."""


def draft_args(
    models: Models,
    options: VllmOptions,
    overrides: Mapping[str, Any],
    *,
    family: Family,
    paths: Mapping[str, str],
    vocabularies: Mapping[str, Vocabulary],
) -> dict[str, Any]:
    """Fields of vLLM's `EngineArgs` with which the first reward model drafts.

    Args:
        models: outlines.
        options: of vLLM, with drafts.
        overrides: as of `config_overrides`.
        family: of all models.
        paths: folder or hub name by role.
        vocabularies: the maps of models whose tokens differ from the base's.

    Raises:
        TitaError: vLLM cannot draft with these models and options.
    """
    role = next(iter(models.rewards), None)
    if role is None:
        raise _refused("without a reward model, which would draft", "give --reward")
    reward = models.rewards[role]
    if os.environ.get(RUNNER_V2) == "1":
        raise _refused(f"with {RUNNER_V2}=1, whose draft models see no image", f"unset {RUNNER_V2}")
    if family.mrope:
        raise _refused(
            f"with {family.architecture}: vLLM's draft models have no positions of several "
            "dimensions (M-RoPE)"
        )
    if any(vlm.adapters is not None for vlm in models.by_role().values()):
        raise _refused("with LoRA adapters, which vLLM's draft models have not", "merge it")
    if options.pipeline_parallel > 1 or options.num_nodes > 1:
        raise _refused("with --pipeline-parallel-size or --nnodes", "these")
    if role in vocabularies or _width(reward) != _width(models.base):
        raise _refused("for models of different vocabularies", where=reward.name)
    if paths[role] == paths["base"]:
        raise _refused("where the reward model is the base model", where=reward.name)
    drafting = dict(overrides) | {
        "tita_drafter": role,
        # vLLM asks for it by this name.
        "image_token_index": image_token_id(models.base.model),
    }
    return {
        "hf_overrides": DraftOverrides(
            combined=drafting, drafter=paths[role], draft_class=draft_name(family)
        ),
        "speculative_config": {
            "method": "draft_model",
            "model": paths[role],
            "num_speculative_tokens": options.max_drafts,
        },
        # The drafts of a step would not be known when its logits are computed.
        "async_scheduling": False,
        # V1 takes none with drafts. Requests come from this engine, and need no check.
        "logits_processors": None,
    }


def _width(vlm: VLM) -> int:
    """Number of tokens of the output layer."""
    width: int = vlm.model.config.get_text_config().vocab_size
    return width


def _refused(why: str, otherwise: str = "", *, where: str | None = None) -> TitaError:
    return TitaError(
        f"engine vllm does not draft {why}",
        where=where,
        remedy=", or ".join(filter(None, ["leave out --max-drafts", otherwise])),
    )
