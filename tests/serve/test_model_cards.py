"""Every answer says which model gave it, and `/v1/models` agrees."""

import dataclasses
import json
import re
from typing import Any

import httpx
import pytest
from in_process import hosted
from serve_process import Server

from tita.align import Guidance
from tita.demo.models import demo_model_path
from tita.serve import ServeOptions
from tita.serve.async_engine import AsyncEngine
from tita.serve.model_cards import DIGEST_HEADER, model_card
from tita.serve.model_loading import LoadedModels, load_models
from tita.serve.serve_options import LoadOptions

CHAT = {"messages": [{"role": "user", "content": "what ?"}], "max_tokens": 3}
PROMPT = {"prompt": "user: what ? assistant:", "max_new_tokens": 3}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat stream": ("/v1/chat/completions", CHAT | {"stream": True}),
    "worker": ("/worker_generate_stream", PROMPT),
}


def pieces(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON objects of a response, whole or streamed."""
    found = [part.removeprefix("data: ") for part in re.split(r"\n\n|\0", response.text)]
    return [json.loads(part) for part in found if part.startswith("{")]


@pytest.mark.parametrize("name", ["tita", "tita:base"])
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_has_the_digest_of_its_model(server: Server, way: str, name: str):
    cards = {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert cards["tita"]["digest"] != cards["tita:base"]["digest"]
    path, body = WAYS[way]
    response = httpx.post(server.url + path, json=body | {"model": name}, timeout=60)
    assert response.status_code == 200, response.text
    assert response.headers[DIGEST_HEADER] == cards[name]["digest"]
    found = {piece["system_fingerprint"] for piece in pieces(response)}
    assert found == {cards[name]["system_fingerprint"]}
    assert found == {f"fp_{cards[name]['digest'][:12]}"}


def digests(loaded: LoadedModels, guidance: Guidance | None = None) -> tuple[str, str]:
    """Of the aligned model and of the base model alone."""
    engine = AsyncEngine(ServeOptions(guidance=guidance or Guidance()))
    engine.loaded = loaded
    return model_card(engine, "tita").digest, model_card(engine, "tita:base").digest


def test_the_digest_covers_what_changes_answers(models: LoadedModels):
    aligned, base = digests(models)
    renamed = dataclasses.replace(
        models, base=models.base.model_copy(update={"name": "x", "source": "y", "run": "z"})
    )
    assert digests(renamed) == (aligned, base)
    other = {"sha256": "0" * 64}
    promoted = dataclasses.replace(
        models, rewards={"reward": models.rewards["reward"].model_copy(update=other)}
    )
    assert digests(promoted)[0] != aligned
    assert digests(promoted)[1] == base, "the base model alone is the same as before"
    assert digests(dataclasses.replace(models, reference=None))[0] != aligned
    for change in (
        other,
        {"dtype": "bfloat16"},
        {"quantization": "4bit"},
        {"image_aspect": "keep"},
    ):
        changed = dataclasses.replace(models, base=models.base.model_copy(update=change))
        assert set(digests(changed)).isdisjoint((aligned, base)), change
    for guidance in (
        Guidance(weight=0.5),
        Guidance(form="genarm"),
        Guidance(plausibility=0.1),
    ):
        assert digests(models, guidance)[0] != aligned
        assert digests(models, guidance)[1] == base


def test_weights_as_loaded_are_in_the_digest():
    path = str(demo_model_path("base"))
    plain, half = (
        load_models(LoadOptions(base=path, dtype=dtype)) for dtype in ("auto", "bfloat16")
    )
    assert (plain.base.dtype, half.base.dtype) == ("float32", "bfloat16")
    assert digests(plain) != digests(half)
    with hosted(half) as client:
        [card, alone] = client.get("/v1/models").json()["data"]
    assert card["digest"] == alone["digest"], "without a reward model both are the same model"
