"""Several questions about one image: it is encoded once, and the answers are unchanged."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from in_process import hosted
from serve_process import about, picture

from tita.serve import ServeOptions
from tita.serve.model_loading import LoadedModels
from tita.serve.serve_options import DEFAULT_ENGINE_OPTIONS


class Encodings(list[str]):
    """The models that encoded an image, in order."""


@contextmanager
def recording(models: LoadedModels) -> Iterator[Encodings]:
    encoded = Encodings()
    hooks = []
    for role in ("base", "reward"):
        tower = models.models.by_role()[role].model.model.vision_tower
        hooks.append(tower.register_forward_hook(lambda *_, role=role: encoded.append(role)))
    try:
        yield encoded
    finally:
        for hook in hooks:
            hook.remove()


def ask(client: httpx.Client, content: bytes, question: str, **fields: object) -> str:
    body = {"model": "tita", "messages": about(content, question), "max_tokens": 6} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def counted(client: httpx.Client, name: str) -> dict[str, float]:
    """Count of each model's role."""
    text = client.get("/metrics").text
    pattern = rf'^tita:{name}_total{{model_name="tita",role="(\w+)"}} (\S+)$'
    return {role: float(value) for role, value in re.findall(pattern, text, re.MULTILINE)}


def test_an_image_is_encoded_once(models: LoadedModels):
    with hosted(models) as client, recording(models) as encoded:
        assert set(counted(client, "prefix_cache_queries").values()) == {0.0}
        first = ask(client, picture("red"), "what color ?")
        assert sorted(encoded) == ["base", "reward"]
        again = ask(client, picture("red"), "what color ?")
        other = ask(client, picture("red"), "is there a 7 ?")
        assert sorted(encoded) == ["base", "reward"]
        assert counted(client, "prefix_cache_hits") == {"base": 2, "reward": 2, "reference": 0}
        assert again == first
        assert other
        # Another image of the same size is encoded.
        ask(client, picture("blue"), "what color ?")
        assert len(encoded) == 4
        assert counted(client, "prefix_cache_hits") == {"base": 2, "reward": 2, "reference": 0}
        # One query a prompt and model; prompts without images are not looked up.
        ask_without_image = {"model": "tita", "messages": [{"role": "user", "content": "what ?"}]}
        assert client.post("/v1/chat/completions", json=ask_without_image).status_code == 200
        assert counted(client, "prefix_cache_queries") == {"base": 4, "reward": 4, "reference": 0}


def test_the_cache_does_not_change_answers(models: LoadedModels):
    strong = {"guidance_weight": 0.9, "max_tokens": 12, "ignore_eos": True}
    questions = [(c, q) for c in ("red", "blue") for q in ("what color ?", "is there a 7 ?")] * 2
    with (
        hosted(models) as cached,
        hosted(
            models, ServeOptions(engine=replace(DEFAULT_ENGINE_OPTIONS, prefix_cache_bytes=0))
        ) as uncached,
    ):
        with_cache, without_cache = (
            [ask(client, picture(colour), question, **strong) for colour, question in questions]
            for client in (cached, uncached)
        )
        assert min(counted(cached, "prefix_cache_hits")[role] for role in ("base", "reward")) > 0
        assert not any(counted(uncached, "prefix_cache_hits").values())
    assert with_cache == without_cache
    assert len(set(with_cache)) > 1


@pytest.mark.parametrize("model", ["tita", "tita:base"])
def test_only_the_models_that_run_encode_the_image(models: LoadedModels, model: str):
    with hosted(models) as client, recording(models) as encoded:
        ask(client, picture("green"), "what ?", model=model)
        assert ("reward" in encoded) == (model == "tita")
