"""Several reward models, and forms over views, over HTTP with the stock `openai` client."""

import copy
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import openai
import PIL.Image
import pytest
import torch
from chromium import Browser, chromium
from in_process import hosted
from serve_process import about, picture

from tests.adapters import merged, save_adapter
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.align.forms import FORMS
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.api_keys import APIKeys
from tita.serve.async_engine import AsyncEngine
from tita.serve.model_loading import LoadedModels, load_models
from tita.serve.serve_options import LoadOptions
from tita.storage.directory import DirectoryStore
from tita.vlm.loading import VLM, Models

QUESTION = "is there a 7 ?"
FIELDS = {"max_tokens": 8, "extra_body": {"ignore_eos": True, "explain": True}}


@pytest.fixture(scope="module")
def two(models: LoadedModels) -> LoadedModels:
    """The demo's reward model as `faithful`, and with noise on its weights as `brief`."""
    reward = models.models.rewards["reward"]
    model, dice = copy.deepcopy(reward.model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=dice)
    other: VLM = dataclasses.replace(reward, model=model)
    return LoadedModels(
        models=Models(models.models.base, more={"faithful": reward, "brief": other}),
        base=models.base,
        rewards=dict.fromkeys(("faithful", "brief"), models.rewards["reward"]),
    )


@pytest.fixture(scope="module")
def client(two: LoadedModels) -> Iterator[openai.OpenAI]:
    with hosted(two) as http:
        yield openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def ask(client: openai.OpenAI, **guidance: object) -> list[dict]:
    fields = {**FIELDS["extra_body"], **guidance}
    answer = client.chat.completions.create(
        model="tita", messages=about(picture("blue"), QUESTION), max_tokens=8, extra_body=fields
    )
    return answer.choices[0].explain


def combined(explained: list[dict]) -> list[float]:
    return [token["combined"] for token in explained]


@pytest.mark.parametrize(
    "how",
    [
        {"weights": {"faithful": 0.3, "brief": 0.6}},
        {"weights": {"brief": 1.1}, "form": "genarm", "plausibility": 0.1},
        {"form": "vcd", "weight": 1.0, "noise_step": 800},
        {"form": "tita_vcd", "weights": {"brief": 0.5}, "contrast": 0.5, "noise_step": 999},
        {"form": "m3id", "weight": 0.3},
        {"form": "cfg", "weight": 0.7, "text": "there is a 7"},
    ],
)
def test_responses_equal_the_engines_answers(
    client: openai.OpenAI, two: LoadedModels, how: dict
) -> None:
    image = PIL.Image.open(io.BytesIO(picture("blue"))).convert("RGB")
    request = Request(
        question=QUESTION, images=(image,), explain=True, guidance=Guidance.of(**how),
        sampling=Sampling(max_new_tokens=8, ignore_end=True),
    )  # fmt: skip
    (wanted,) = Engine(two.models).generate([request])
    found = ask(client, **{f"guidance_{name}": value for name, value in how.items()})
    assert [t["token"] for t in found] == [t.text for t in wanted.tokens]
    for one, other in zip(found, wanted.tokens, strict=True):
        assert one["combined"] == pytest.approx(other.combined, abs=1e-3)
        assert one["terms"] == pytest.approx(dict(other.terms), abs=1e-3)


def test_defaults_and_models_are_listed(client: openai.OpenAI) -> None:
    [card, alone] = client.models.list().data
    assert list(card.rewards) == ["faithful", "brief"]
    assert card.reward is None
    assert card.guidance_weights == {"faithful": 0.15, "brief": 0.15}
    assert alone.rewards == {}
    assert card.guidance_forms == [name for name in FORMS if name != "dpo"]
    assert card.guidance_view_forms == ["vcd", "m3id", "cfg"]
    named = ask(client, guidance_weights={"faithful": 0.15, "brief": 0.15})
    assert combined(ask(client)) == pytest.approx(combined(named), abs=1e-4)
    # A form without reward models has its own defaults.
    given = {"guidance_weight": 1, "guidance_plausibility": 0.1}
    own, named = ask(client, guidance_form="vcd"), ask(client, guidance_form="vcd", **given)
    assert combined(own) == pytest.approx(combined(named), abs=1e-4)
    for none in ({"brief": 0}, {}):
        assert [t["token"] for t in ask(client, guidance_weight=0)] == [
            t["token"] for t in ask(client, guidance_weights=none)
        ]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"weights": {"polite": 0.1}}, "weights", "no reward model 'polite'; choose from faithful"),
        ({"weight": 0.1}, "weight", "one weight for 2 reward models; give weights of faithful"),
        ({"weight": 0.1, "weights": {"brief": 0.1}}, "weights", "send one"),
        ({"weights": {"brief": 0.1}, "form": "vcd"}, "weights", "form vcd uses no reward model"),
        ({"text": "a 7", "form": "vcd"}, "text", "form vcd adds no text; choose form cfg"),
        ({"contrast": 0.5, "form": "vcd"}, "contrast", "contrast has no effect on form vcd"),
        ({"weights": {"brief": -1}}, "weights.brief", "greater than or equal to 0"),
        ({"noise_step": 1000, "form": "vcd"}, "noise_step", "less than 1000"),
    ],
)
def test_mistakes_are_refused(
    client: openai.OpenAI, fields: dict, param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{f"guidance_{name}": value for name, value in fields.items()})
    assert message in caught.value.body["message"]
    assert caught.value.body["param"] == f"guidance_{param}"


def test_the_base_alone_takes_forms_over_views(models: LoadedModels) -> None:
    loaded = LoadedModels(models=Models(models.models.base), base=models.base)
    with hosted(loaded) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].guidance_forms == ["vcd", "m3id", "cfg"]
        assert {*ask(client, guidance_form="vcd")[0]["terms"]} == {"base", "base/distorted"}
        assert {*ask(client)[0]["terms"]} == {"base"}
        with pytest.raises(openai.BadRequestError, match="the server has no reward model"):
            ask(client, guidance_weight=0.3)


def test_names_and_weights_are_checked_at_startup(models: LoadedModels) -> None:
    guidance = Guidance(weights={"polite": 0.1})
    with pytest.raises(TitaError, match="no reward model 'polite'; choose from brief"):
        load_models(LoadOptions(base="x", rewards={"brief": "y"}, guidance=guidance))


def test_the_page_has_a_slider_per_reward(browser: Browser, two: LoadedModels) -> None:
    options = ServeOptions(guidance=Guidance(weights={"faithful": 0.4, "brief": 0.2}))
    with hosted(two, options) as http:
        browser.open(http)
        browser.until("document.querySelectorAll('#weights input').length === 2")
        shown = "return [...document.querySelectorAll('#weights label')].map(l => l.textContent)"
        assert browser.run(shown) == ["Weight of faithful 0.40", "Weight of brief 0.20"]
        browser.run(
            "const i = document.getElementById('weight-brief'); i.value = 0.9;"
            "i.dispatchEvent(new Event('input')); document.getElementById('form').requestSubmit()"
        )
        assert browser.run(shown)[1] == "Weight of brief 0.90"
        browser.until("document.body.dataset.state === 'done'")
        assert browser.text("aligned-error") == ""
        assert browser.text("aligned")
        browser.run(
            "const f = document.getElementById('form-name'); f.value = 'vcd';"
            "f.dispatchEvent(new Event('change'));"
        )
        assert browser.run("return document.getElementById('weight-brief').disabled") is True
    # That form as the server's default takes no weights either.
    with hosted(two, ServeOptions(guidance=Guidance.of(form="vcd"))) as http:
        browser.open(http)
        browser.until("document.querySelectorAll('#weights input:disabled').length === 2")
        browser.run("document.getElementById('form').requestSubmit()")
        browser.until("document.body.dataset.state === 'done'")
        assert browser.text("aligned-error") == ""
        assert browser.text("aligned")


def test_best_of_returns_the_best_with_scores(client: openai.OpenAI, two: LoadedModels) -> None:
    fields = {
        "model": "tita", "messages": about(picture("blue"), "describe"), "temperature": 1.5,
        "seed": 4, "max_tokens": 6,
    }  # fmt: skip

    def best(number: int, **more: object) -> list:
        extra = {"best_of": number, "guidance_weight": 0}
        return client.chat.completions.create(**fields, extra_body=extra, **more).choices

    everything, [first] = best(5, n=5), best(5)
    scores = [choice.score for choice in everything]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert first.message.content == everything[0].message.content
    assert first.score == pytest.approx(scores[0], abs=1e-3)
    [alone] = best(1)
    plain = client.chat.completions.create(**fields, extra_body={"guidance_weight": 0}).choices[0]
    assert alone.message.content == plain.message.content
    assert not hasattr(plain, "score")
    for wrong, message in (
        ({"stream": True}, "cannot be streamed"),
        ({"n": 6}, "at least n"),
        ({"temperature": 0}, "all answers are the same"),
    ):
        extra = {"best_of": 5, "guidance_weight": 0}
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(**{**fields, **wrong}, extra_body=extra)


def test_adapters_share_a_model_over_http(
    models: LoadedModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--reward a=FOLDER --reward b=FOLDER` finds the model that both adapters belong to."""
    store, plain = DirectoryStore(tmp_path / "store"), models.models.rewards["reward"]
    store.push_tree(demo_model_path("reward"), "models/small")
    places = {}
    for seed, name in enumerate(("faithful", "brief")):
        places[name] = run = tmp_path / name
        save_adapter(plain.model, run / "adapter", base="models/small", seed=seed)
        store.push_tree(run, f"runs/{name}")
    loaded = load_models(
        LoadOptions(
            base=str(demo_model_path("base")),
            rewards={name: f"runs/{name}/adapter" for name in places},
        ),
        store=store,
    )
    assert "parameters of an adapter for" in capsys.readouterr().err
    apart = {name: merged(plain, run / "adapter") for name, run in places.items()}
    image = PIL.Image.open(io.BytesIO(picture("blue"))).convert("RGB")
    weights = {"faithful": 0.3, "brief": 0.4}
    (wanted,) = Engine(Models(models.models.base, more=apart)).generate([
        Request(
            question=QUESTION, images=(image,), explain=True, guidance=Guidance(weights=weights),
            sampling=Sampling(max_new_tokens=8, ignore_end=True),
        )
    ])  # fmt: skip
    with hosted(loaded) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        found = ask(client, guidance_weights=weights)
        assert [t["token"] for t in found] == [t.text for t in wanted.tokens]
        assert combined(found) == pytest.approx([t.combined for t in wanted.tokens], abs=1e-3)
        [card, _] = client.models.list().data
        assert {name: each["adapter_of"] for name, each in card.rewards.items()} == {
            "faithful": "models/small", "brief": "models/small",
        }  # fmt: skip
        assert [each["run"] for each in card.rewards.values()] == ["faithful", "brief"]
        assert len({each["sha256"] for each in card.rewards.values()}) == 2
    with hosted(loaded, ServeOptions(engine=EngineOptions(max_adapters=1), guidance=FIRST)) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        for name in ("brief", "faithful"):
            assert ask(client, guidance_weights={name: 0.3})
        # `tita ask` and the page explain every answer, those of the base alone, too.
        assert {*ask(client, guidance_weight=0)[0]["terms"]} == {"base"}
        with pytest.raises(openai.BadRequestError, match="uses 2 adapters, more than may be in"):
            ask(client, guidance_weights=weights)
    few = ServeOptions(engine=EngineOptions(max_adapters=1))
    with pytest.raises(TitaError, match="the default guidance uses 2 adapters, more than"):
        AsyncEngine(few).load(loaded)
    with pytest.raises(TitaError, match="uses 2 adapters, and the engine has 1 per request"):
        AsyncEngine(ServeOptions(engine_name="vllm")).load(loaded)
    # The default weights of an API key, too, and the reference model of a form.
    keys = APIKeys("one-key\ntwo-key faithful=0.3 brief=0.1", where="TITA_API_KEYS")
    one = dataclasses.replace(few, guidance=FIRST)
    message = (
        "TITA_API_KEYS, line 2: the default guidance uses 2 adapters, more than may be in memory"
    )
    with pytest.raises(TitaError, match=message) as caught:
        AsyncEngine(dataclasses.replace(one, keys=keys)).load(loaded)
    assert "two-key" not in str(caught.value)
    first, brief = (loaded.models.rewards[name] for name in places)
    before = dataclasses.replace(
        loaded, models=Models(loaded.models.base, first, brief), rewards={}
    )
    with pytest.raises(TitaError, match="the default guidance uses 2 adapters, and the engine has"):
        AsyncEngine(ServeOptions(engine_name="vllm", guidance=Guidance(form="dpo"))).load(before)


FIRST = Guidance(weights={"faithful": 0.3})
