"""Guidance of requests: fields of the request, defaults of the server, and startup checks."""

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
from typer.main import get_command

from tita.align import Engine, Guidance, Request, Sampling
from tita.align.forms import FORMS
from tita.cli.commands import app
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.model_loading import LoadedModels, load_models
from tita.serve.serve_options import DEFAULT_ENGINE_OPTIONS, LoadOptions
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
def test_responses_equal_the_engines_answers(server: Server, models: LoadedModels, how: dict):
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


def test_with_the_base_as_reference_form_dpo_equals_form_tita(server: Server):
    forms = ("tita", "dpo", "genarm")
    tita, dpo, genarm = (
        combined(choice(httpx, server.url, **SURE, guidance_form=form)) for form in forms
    )
    assert dpo == pytest.approx(tita, abs=1e-3)
    assert genarm != pytest.approx(tita, abs=1e-3)


def test_plausibility_1_allows_only_the_base_models_top_token(server: Server):
    strong = {"guidance_weight": 2.5, "max_tokens": 8, "ignore_eos": True}
    base = choice(httpx, server.url, **strong | {"guidance_weight": 0})
    guided = choice(httpx, server.url, **strong)
    bounded = choice(httpx, server.url, **strong, guidance_plausibility=1)
    assert guided["message"]["content"] != base["message"]["content"]
    assert bounded["message"]["content"] == base["message"]["content"]


def test_requests_without_guidance_use_the_servers_default(models: LoadedModels):
    fields = {"max_tokens": 8, "ignore_eos": True, "explain": True}
    options = ServeOptions(guidance=Guidance(weight=2.5, form="dpo", plausibility=1.0))
    with hosted(models, options) as client:
        [card, alone] = client.get("/v1/models").json()["data"]
        assert (card["guidance_weight"], card["guidance_form"]) == (2.5, "dpo")
        assert card["guidance_plausibility"] == 1
        assert card["guidance_forms"] == list(FORMS)
        assert alone["guidance_weight"] == 0
        own = choice(client, **fields)
        named = {"guidance_weight": 2.5, "guidance_form": "dpo", "guidance_plausibility": 1}
        assert combined(own) == pytest.approx(combined(choice(client, **fields, **named)), abs=1e-4)
        other = choice(client, **fields, **named | {"guidance_plausibility": 0})
        assert combined(other) != pytest.approx(combined(own), abs=1e-4)


def test_form_dpo_without_a_reference_model_is_rejected(models: LoadedModels):
    without = LoadedModels(
        models=dataclasses.replace(models.models, reference=None),
        base=models.base,
        rewards=models.rewards,
    )
    with hosted(without) as client:
        [card, _] = client.get("/v1/models").json()["data"]
        assert card["reference"] is None
        assert card["guidance_forms"] == [name for name in FORMS if name != "dpo"]
        body = {"model": "tita", "messages": about(picture(), "what ?"), "guidance_form": "dpo"}
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "guidance_form"
        assert "tita, genarm" in refused.json()["error"]["message"]


def test_packing_and_drafting_do_not_change_answers(server: Server):
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    own = load_models(LoadOptions(base=base, reward=reward))
    fields = {"guidance_weight": 0.5, "max_tokens": 12, "temperature": 1, "seed": 5}
    engine_options = dataclasses.replace(DEFAULT_ENGINE_OPTIONS, max_drafts=0, pack=True)
    with hosted(own, ServeOptions(engine=engine_options)) as client:
        assert choice(client, **fields) == choice(httpx, server.url, **fields)
        assert "tita:spec_decode_num_draft_tokens_total{" in client.get("/metrics").text
    assert unpack_linears(own.models.base) > 0
    assert unpack_linears(own.models.reward) > 0


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"guidance": {"form": "dpo"}}, "--form dpo without --reference"),
        ({"guidance": {"form": "magic"}}, "no guidance form 'magic'"),
        ({"reference": "x", "reward": None}, "--reference without --reward"),
        ({"quantization": "8bit"}, "bitsandbytes"),
    ],
)
def test_unsupported_combinations_are_rejected_at_startup(given: dict[str, Any], what: str):
    if what == "bitsandbytes" and importlib.util.find_spec(what):
        pytest.skip("bitsandbytes is installed")
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    options = {"base": base, "reward": reward} | given

    def load() -> None:
        guidance = Guidance(**options.pop("guidance", {}))
        load_models(LoadOptions(**options, guidance=guidance))

    with pytest.raises(TitaError, match=what):
        load()


def test_image_aspect_applies_to_all_models():
    models = dict.fromkeys(("base", "reward", "reference"), str(demo_model_path("reward")))
    for setting, aspect in (("auto", "pad"), ("keep", "keep")):
        loaded = load_models(LoadOptions(**models, image_aspect=setting))
        assert [vlm.image_aspect for vlm in loaded.models.by_role().values()] == [aspect] * 3


def test_options_are_checked_before_models_are_loaded():
    models = ["--base", str(demo_model_path("base")), "--reward", str(demo_model_path("reward"))]
    done = subprocess.run(
        [sys.executable, "-m", "tita", "serve", "--port", "0", *models, "--form", "dpo"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "--form dpo without --reference" in line


@pytest.mark.parametrize(
    ("given", "is_said"),
    [
        (["--weight", "0.3"], True),
        (["--form", "genarm"], True),
        (["--weight", "0"], False),
        (["--form", "vcd", "--weight", "0.4"], False),
        (["--reward", "r", "--weight", "0.3"], False),
        ([], False),
    ],
)
def test_a_weight_without_a_reward_model_is_said(
    given: list[str], is_said: bool, capsys: pytest.CaptureFixture[str]
):
    arguments = ["serve", "--base", "b", *given, "--api-keys-file", "/nowhere"]
    with pytest.raises(TitaError, match="/nowhere: no such file"):
        get_command(app)(arguments, standalone_mode=False)
    said = "tita serve: without --reward, --weight and --form have no effect: the base answers\n"
    assert capsys.readouterr().err == (said if is_said else "")
