"""The same image asked about again: no second look at it, and its keys and values shared."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from in_process import hosted
from serve_process import about, picture

from tita.serve import ServeOptions
from tita.serve.loading import LoadedModels


class Looks(list[str]):
    """Which model looked at an image, in order."""


@contextmanager
def looking(models: LoadedModels) -> Iterator[Looks]:
    looks = Looks()
    hooks = []
    for loaded, role in ((models.base, "base"), (models.reward, "reward")):
        assert loaded is not None
        tower = loaded.vlm.model.model.vision_tower
        hooks.append(tower.register_forward_hook(lambda *_, role=role: looks.append(role)))
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def ask(client: httpx.Client, content: bytes, question: str, **fields: object) -> str:
    body = {"model": "tita", "messages": about(content, question), "max_tokens": 6} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def counted(client: httpx.Client, name: str) -> float:
    text = client.get("/metrics").text
    (found,) = re.findall(rf"^tita:{name}_total{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    return float(found)


def test_an_image_is_looked_at_once(models: LoadedModels):
    with hosted(models) as client, looking(models) as looks:
        hits = counted(client, "prefix_cache_hits")
        first = ask(client, picture("red"), "what color ?")
        assert sorted(looks) == ["base", "reward"]
        again = ask(client, picture("red"), "what color ?")
        other = ask(client, picture("red"), "is there a 7 ?")
        assert sorted(looks) == ["base", "reward"]
        assert counted(client, "prefix_cache_hits") == hits + 4
        assert again == first
        assert other
        # Another image of the same size is another image, however like the questions are.
        ask(client, picture("blue"), "what color ?")
        assert len(looks) == 4
        assert counted(client, "prefix_cache_hits") == hits + 4


def test_what_is_kept_does_not_change_an_answer(models: LoadedModels):
    strong = {"guidance_weight": 0.9, "max_tokens": 12, "ignore_eos": True}
    asked = [(c, q) for c in ("red", "blue") for q in ("what color ?", "is there a 7 ?")] * 2
    with hosted(models) as keeping, hosted(models, ServeOptions(prefix_cache_bytes=0)) as forgetful:
        kept, fresh = (
            [ask(client, picture(colour), question, **strong) for colour, question in asked]
            for client in (keeping, forgetful)
        )
        assert counted(keeping, "prefix_cache_hits") > 0
        assert counted(forgetful, "prefix_cache_hits") == 0
    assert kept == fresh
    assert len(set(kept)) > 1


@pytest.mark.parametrize("model", ["tita", "tita:base"])
def test_the_base_alone_looks_alone(models: LoadedModels, model: str):
    with hosted(models) as client, looking(models) as looks:
        ask(client, picture("green"), "what ?", model=model)
        assert ("reward" in looks) == (model == "tita")
