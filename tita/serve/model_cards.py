"""The served models as `/v1/models` lists them, and the digest that every answer carries."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from tita.align import Guidance
from tita.align.forms import UNGUIDED
from tita.serve import errors
from tita.serve.api_keys import KEY_WEIGHTS
from tita.serve.async_engine import AsyncEngine
from tita.serve.model_loading import LoadedModels
from tita.serve.schemas import Checkpoint, ModelCard

DIGEST_HEADER = "x-tita-model-digest"
"""Response header of an answer: the `digest` of the model that gave it."""


def model_cards(engine: AsyncEngine) -> list[ModelCard]:
    """The aligned model, then the base model alone.

    Raises:
        APIError: the models are still loading.
    """
    return [model_card(engine, name) for name in (engine.options.name, engine.options.base_name)]


def model_card(engine: AsyncEngine, name: str) -> ModelCard:
    """The card of one model, with the default weights of the request's API key.

    Raises:
        APIError: there is no such model, or the models are still loading.
    """
    options = engine.options
    if engine.loaded is None:
        raise errors.loading()
    if name not in (options.name, options.base_name):
        raise errors.model_not_found(name, served=(options.name, options.base_name))
    key = (name, *sorted(KEY_WEIGHTS.get().items()))
    if key not in engine.cards:
        engine.cards[key] = _card(engine, engine.loaded, name)
    return engine.cards[key]


def _card(engine: AsyncEngine, loaded: LoadedModels, name: str) -> ModelCard:
    options = engine.options
    guided = name == options.name
    rewards = loaded.rewards if guided else {}
    reference = loaded.reference if guided else None
    guidance = engine.default_guidance if guided else UNGUIDED
    digest = _digest(loaded.base, rewards, reference, guidance)
    return ModelCard(
        id=name,
        created=engine.created,
        root=loaded.base.name,
        parent=None if name == options.base_name else options.base_name,
        digest=digest,
        system_fingerprint=f"fp_{digest[:12]}",
        max_model_len=engine.context,
        guidance_weight=guidance.weight,
        guidance_weights=dict(guidance.weights) or None,
        guidance_form=options.guidance.form,
        guidance_forms=engine.forms,
        guidance_view_forms=engine.view_forms,
        guidance_plausibility=guidance.plausibility,
        base=loaded.base,
        reward=next(iter(rewards.values())) if len(rewards) == 1 else None,
        rewards=dict(rewards),
        reference=reference,
    )


def _digest(
    base: Checkpoint,
    rewards: Mapping[str, Checkpoint],
    reference: Checkpoint | None,
    guidance: Guidance,
) -> str:
    # These tell where a model came from, not what it answers.
    origin = {"name", "source", "run", "adapter_of"}
    models = {name: each.model_dump(exclude=origin) for name, each in rewards.items()}
    others = [each and each.model_dump(exclude=origin) for each in (base, reference)]
    how = dataclasses.asdict(guidance)
    identity = json.dumps([others, models, how], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()
