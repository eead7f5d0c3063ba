"""What a request says about guidance reaches the engine; where it is silent, the server's own."""

import dataclasses
import importlib.util
import io
import subprocess
import sys
from typing import Any

import httpx
import PIL.Image
import pytest
from in_process import hosted
from serve_process import Server, about, picture

from tita.align import Engine, Guidance, Request, Sampling
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.loading import LoadedModels, LoadOptions
from tita.vlm.packing import unpack_linears

QUESTION = "is there a 7 ?"
SURE = {"guidance_weight": 0.9, "explain": True, "max_tokens": 8, "ignore_eos": True}


def choice(client: Any, url: str = "", **fields: Any) -> dict[str, Any]:
    body = {"model": "tita", "messages": about(picture("blue"), QUESTION)} | fields
    response = client.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def combined(answer: dict[str, Any]) -> list[float]:
    return [token["combined"] for token in answer["explain"]]


@pytest.mark.parametrize(
    "how",
    [
        {"form": "tita", "weight": 0.9},
        {"form": "genarm", "weight": 0.9},
        {"form": "dpo", "weight": 1.7},
        {"form": "genarm", "weight": 1.5, "plausibility": 0.3},
    ],
)
def test_a_request_is_guided_as_the_engine_guides(server: Server, models: LoadedModels, how: dict):
    image = PIL.Image.open(io.BytesIO(picture("blue"))).convert("RGB")
    request = Request(
        question=QUESTION, images=(image,), explain=True, guidance=Guidance(**how),
        sampling=Sampling(max_new_tokens=8, ignore_end=True),
    )  # fmt: skip
    (expected,) = Engine(models.models).generate([request])
    fields = {f"guidance_{name}": value for name, value in how.items()}
    found = choice(httpx, server.url, **SURE | fields)
    assert combined(found) == pytest.approx([t.combined for t in expected.tokens], abs=1e-3)
    assert [t["token"] for t in found["explain"]] == [t.text for t in expected.tokens]


def test_compared_with_the_base_itself_the_ratio_is_the_difference(server: Server):
    forms = ("tita", "dpo", "genarm")
    tita, dpo, genarm = (
        combined(choice(httpx, server.url, **SURE, guidance_form=form)) for form in forms
    )
    assert dpo == pytest.approx(tita, abs=1e-3)
    assert genarm != pytest.approx(tita, abs=1e-3)


def test_only_the_likeliest_token_is_plausible_at_1(server: Server):
    strong = {"guidance_weight": 2.5, "max_tokens": 8, "ignore_eos": True}
    base = choice(httpx, server.url, **strong | {"guidance_weight": 0})
    guided = choice(httpx, server.url, **strong)
    bounded = choice(httpx, server.url, **strong, guidance_plausibility=1)
    assert guided["message"]["content"] != base["message"]["content"]
    assert bounded["message"]["content"] == base["message"]["content"]


def test_a_servers_own_guidance_holds_for_requests_that_name_none(models: LoadedModels):
    asked = {"max_tokens": 8, "ignore_eos": True, "explain": True}
    options = ServeOptions(weight=2.5, form="dpo", plausibility=1.0)
    with hosted(models, options) as client:
        [card, alone] = client.get("/v1/models").json()["data"]
        assert (card["guidance_weight"], card["guidance_form"]) == (2.5, "dpo")
        assert card["guidance_plausibility"] == 1
        assert card["guidance_forms"] == ["tita", "genarm", "dpo"]
        assert alone["guidance_weight"] == 0
        own = choice(client, **asked)
        named = {"guidance_weight": 2.5, "guidance_form": "dpo", "guidance_plausibility": 1}
        assert combined(own) == pytest.approx(combined(choice(client, **asked, **named)), abs=1e-4)
        other = choice(client, **asked, **named | {"guidance_plausibility": 0})
        assert combined(other) != pytest.approx(combined(own), abs=1e-4)


def test_a_form_without_its_reference_is_refused(models: LoadedModels):
    with hosted(dataclasses.replace(models, reference=None)) as client:
        [card, _] = client.get("/v1/models").json()["data"]
        assert card["reference"] is None
        assert card["guidance_forms"] == ["tita", "genarm"]
        body = {"model": "tita", "messages": about(picture(), "what ?"), "guidance_form": "dpo"}
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "guidance_form"
        assert "tita, genarm" in refused.json()["error"]["message"]


def test_packed_and_undrafted_answers_are_the_same(server: Server):
    """Neither is a matter of what is said."""
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    own = LoadOptions(base=base, reward=reward).load()
    asked = {"guidance_weight": 0.5, "max_tokens": 12, "temperature": 1, "seed": 5}
    with hosted(own, ServeOptions(max_drafts=0, pack=True)) as client:
        assert choice(client, **asked) == choice(httpx, server.url, **asked)
        assert "tita:spec_decode_num_draft_tokens_total{" in client.get("/metrics").text
    assert unpack_linears(own.base.vlm) > 0
    assert unpack_linears(own.reward.vlm) > 0


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"form": "dpo"}, "--form dpo without --reference"),
        ({"form": "magic"}, "no guidance form 'magic'"),
        ({"reference": "x", "reward": None}, "--reference without --reward"),
        ({"quantization": "8bit"}, "bitsandbytes"),
    ],
)
def test_what_these_models_cannot_do_is_told(given: dict[str, Any], what: str):
    if what == "bitsandbytes" and importlib.util.find_spec(what):
        pytest.skip("bitsandbytes is installed: nothing to tell")
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    with pytest.raises(TitaError, match=what):
        LoadOptions(**{"base": base, "reward": reward} | given).load()


def test_all_models_are_shown_images_as_wanted():
    models = dict.fromkeys(("base", "reward", "reference"), str(demo_model_path("reward")))
    for wanted, aspect in (("auto", "pad"), ("keep", "keep")):
        loaded = LoadOptions(**models, image_aspect=wanted).load()
        assert [vlm and vlm.image_aspect for vlm in loaded.vlms] == [aspect] * 3


def test_it_is_told_before_anything_is_loaded():
    models = ["--base", str(demo_model_path("base")), "--reward", str(demo_model_path("reward"))]
    done = subprocess.run(
        [sys.executable, "-m", "tita", "serve", "--port", "0", *models, "--form", "dpo"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "--form dpo without --reference" in line
