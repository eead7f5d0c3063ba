"""The served models as `/v1/models` lists them, and the digest that every answer carries."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from tita.align import Guidance
from tita.align.requests import UNGUIDED
from tita.serve import errors
from tita.serve.async_engine import AsyncEngine
from tita.serve.schemas import Checkpoint, ModelCard

DIGEST_HEADER = "x-tita-model-digest"
"""Response header of an answer: the `digest` of the model that gave it."""


def model_cards(engine: AsyncEngine) -> list[ModelCard]:
    """The aligned model, then the base model alone.

    Raises:
        APIError: the models are still loading.
    """
    loaded, options = engine.loaded, engine.options
    if loaded is None:
        raise errors.loading()

    def card(name: str, *, guided: bool) -> ModelCard:
        reward = loaded.reward if guided else None
        reference = loaded.reference if guided else None
        guidance = options.guidance if guided else UNGUIDED
        digest = _digest((loaded.base, reward, reference), guidance)
        return ModelCard(
            id=name,
            created=engine.created,
            root=loaded.base.name,
            parent=None if name == options.base_name else options.base_name,
            digest=digest,
            system_fingerprint=f"fp_{digest[:12]}",
            max_model_len=engine.context,
            guidance_weight=guidance.weight,
            guidance_form=options.guidance.form,
            guidance_forms=engine.forms,
            guidance_plausibility=guidance.plausibility,
            base=loaded.base,
            reward=reward,
            reference=reference,
        )

    return [card(options.name, guided=engine.guided), card(options.base_name, guided=False)]


def model_card(engine: AsyncEngine, name: str) -> ModelCard:
    """The card of one model.

    Raises:
        APIError: there is no such model, or the models are still loading.
    """
    found = next((card for card in model_cards(engine) if card.id == name), None)
    if found is None:
        options = engine.options
        raise errors.model_not_found(name, served=(options.name, options.base_name))
    return found


def _digest(checkpoints: Sequence[Checkpoint | None], guidance: Guidance) -> str:
    # Name, source and run tell where a model came from, not what it answers.
    origin = {"name", "source", "run"}
    models = [each and each.model_dump(exclude=origin) for each in checkpoints]
    identity = json.dumps([models, dataclasses.asdict(guidance)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()
