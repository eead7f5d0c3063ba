"""`/v1/models`: which models can be asked, and where they came from."""

from fastapi import APIRouter

from tita.serve import failures
from tita.serve.asking import guidance_weight
from tita.serve.schemas import ModelCard, ModelList
from tita.serve.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", responses=failures.IN_OPENAPI)

    @routes.get("/models", response_model=ModelList)
    async def models() -> ModelList:
        return ModelList(data=_cards(serving))

    @routes.get("/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        cards = _cards(serving)
        guidance_weight(name, None, serving=serving)
        return next(card for card in cards if card.id == name)

    return routes


def _cards(serving: Serving) -> list[ModelCard]:
    """The aligned model, then the base alone.

    Raises:
        Refusal: they are still being loaded.
    """
    base = serving.base
    if base is None:
        raise failures.loading()

    def card(name: str, *, guided: bool) -> ModelCard:
        return ModelCard(
            id=name,
            created=serving.created,
            root=base.name,
            parent=None if name == serving.options.base_name else serving.options.base_name,
            max_model_len=serving.context,
            guidance_weight=serving.options.weight if guided else 0.0,
            guidance_form=serving.options.form,
            guidance_forms=serving.forms,
            guidance_plausibility=serving.options.plausibility if guided else 0.0,
            base=base,
            reward=serving.reward if guided else None,
            reference=serving.reference if guided else None,
        )

    options = serving.options
    return [card(options.name, guided=serving.guided), card(options.base_name, guided=False)]
