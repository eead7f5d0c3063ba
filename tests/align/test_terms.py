"""Every form equals its definition in models of several families, however requests are batched.

Two reward models, and views of the base: of a distorted image, of no image, with an added text.
"""

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import PIL.Image
import pytest
import torch

from tests.align.always import Always
from tests.align.definition import (
    LENGTH,
    Definition,
    by_definition,
    perturbed,
    sampled_sequence,
)
from tests.families import FAMILIES, saved
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.align.forms import BASE, FORMS, Source, Term, View
from tita.align.guidance import log_softmax
from tita.align.model_runner import ModelRunner
from tita.align.sampling import SourceLogits, choose
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.vlm.loading import VLM, Models, load_vlm
from tita.vlm.prompts import BadConversation, Turn

TEXT = "there is an image"
GUIDANCES = (
    Guidance(form="tita", weights={"faithful": 0.3, "brief": 0.9}),
    Guidance(form="genarm", weights={"brief": 0.4, "faithful": 1.2}, plausibility=0.05),
    Guidance(form="dpo", weights={"faithful": 0.5, "brief": 0.5}),
    Guidance(form="vcd", weight=1.0, noise_step=900, plausibility=0.02),
    Guidance(
        form="tita_vcd",
        weights={"faithful": 0.2, "brief": 0.3},
        contrast=0.7,
        noise_step=999,
        plausibility=0.02,
    ),
    Guidance(form="m3id", weight=0.4),
    Guidance(form="cfg", weight=2.5),
    Guidance(form="cfg", weight=0.7, text=TEXT),
    Guidance(weight=0.0),
)
SAMPLING = Sampling(max_new_tokens=LENGTH, ignore_end=True)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "internvl", "idefics3"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    if request.param == "llava":
        base, reward = (load_vlm(str(demo_model_path(role))) for role in ("base", "reward"))
        others = {"faithful": perturbed(reward, seed=1), "brief": perturbed(reward, seed=2)}
        return Models(base, None, reward, more=others)

    def loaded(seed: int) -> VLM:
        folder = saved(FAMILIES[request.param], tmp_path_factory.mktemp(request.param), seed=seed)
        vlm = load_vlm(str(folder))
        vlm.model.to("cpu")
        return vlm

    base, faithful, brief, reference = map(loaded, (1, 2, 3, 4))
    return Models(base, None, reference, more={"faithful": faithful, "brief": brief})


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Every form on images of several aspects, some twice; one question without images."""
    dice = torch.Generator().manual_seed(0)

    def image(width: int, height: int) -> PIL.Image.Image:
        pixels = torch.randint(255, (height, width, 3), dtype=torch.uint8, generator=dice)
        return PIL.Image.fromarray(pixels.numpy())

    shown = [image(40, 60), image(60, 40), image(64, 64)]
    words = ("what number ?", "what is there in the image ?", "yes ?")
    ways = zip(
        (*GUIDANCES, *GUIDANCES[:7:2]), itertools.cycle(shown), itertools.cycle(words), strict=False
    )
    found = [
        Request(question=text, images=(each,), guidance=guidance, sampling=SAMPLING)
        for guidance, each, text in ways
    ]
    return [dataclasses.replace(found[3], images=()), *found]


def test_answers_equal_the_definition(models: Models, requests: list[Request]) -> None:
    """In one batch, in chunks, with kept images, alone, and with drafts."""
    wanted = [by_definition(models, request) for request in requests]
    assert len({tuple(each) for each in wanted}) > len(requests) // 2
    for options in (
        EngineOptions(),
        EngineOptions(prefill_tokens=4),
        EngineOptions(prefill_tokens=4, prefix_cache_bytes=2**20),
    ):
        engine = Engine(models, options)
        assert [list(answer.token_ids) for answer in engine.generate(requests)] == wanted
    few = dict(engine.generate_as_completed(iter(requests), batch_size=3))
    assert [list(few[n].token_ids) for n in range(len(requests))] == wanted  # type: ignore[union-attr]
    engine.draft_policy = Always(max_drafts=3)
    alone = [engine.generate([request])[0] for request in requests]
    assert [list(answer.token_ids) for answer in alone] == wanted
    assert engine.draft_policy.num_drafted > 0


@torch.inference_mode()
def test_log_probabilities_equal_the_definition(models: Models, requests: list[Request]) -> None:
    """Of every token under the combined distribution and each source."""
    asked = [dataclasses.replace(request, explain=True) for request in requests[1:10]]
    for request, answer in zip(asked, Engine(models).generate(asked), strict=True):
        definition = Definition(models, request)
        for number, token in enumerate(answer.tokens):
            before = answer.token_ids[:number]
            scores, base = definition.scores(before)
            terms = dict(token.terms)
            assert token.combined == pytest.approx(
                float(log_softmax(scores)[0, token.id]), abs=1e-4
            )
            assert token.base == terms["base"] == pytest.approx(float(base[0, token.id]), abs=1e-4)
            for name, found in terms.items():
                model, _, view = name.partition("/")
                seen = {
                    "": {},
                    "distorted": {"image": "distorted"},
                    "no-image": {"image": "none"},
                    "text": {"text": TEXT},
                }[view]
                wanted = definition.log_p(before, model, **seen)[0, token.id]  # type: ignore[arg-type]
                assert found == pytest.approx(float(wanted), abs=1e-4)
        guidance = request.guidance
        assert terms.keys() == {
            "base",
            *({"faithful", "brief"} if guidance.uses_rewards else ()),
            *({"reference"} if guidance.form == "dpo" else ()),
            *({"base/distorted"} if guidance.form in ("vcd", "tita_vcd") else ()),
            *({"base/no-image"} if guidance.form == "m3id" else ()),
            *(
                {f"base/{'text' if guidance.text else 'no-image'}"}
                if guidance.form == "cfg"
                else ()
            ),
        }


def tokens_of(models: Models, requests: list[Request], **guidance: Any) -> list[tuple[int, ...]]:
    asked = [dataclasses.replace(each, guidance=Guidance(**guidance)) for each in requests]
    return [answer.token_ids for answer in Engine(models).generate(asked)]


def test_identities(models: Models, requests: list[Request]) -> None:
    """Choices of weights under which forms are the same."""
    some, base = requests[:5], tokens_of(models, requests[:5], weight=0.0)
    one = Models(models.base, models.rewards["faithful"])
    alone = tokens_of(one, some, weight=0.6)
    assert alone != base
    # One of two reward models at 0 takes no part.
    assert tokens_of(models, some, weights={"faithful": 0.6, "brief": 0.0}) == alone
    assert tokens_of(models, some, weights={"faithful": 0.6}) == alone
    # One reward model twice with half the weight is that model once.
    twice = Models(models.base, more=dict.fromkeys(("a", "b"), models.rewards["faithful"]))
    assert tokens_of(twice, some, weights={"a": 0.3, "b": 0.3}) == alone
    assert tokens_of(models, some, form="vcd", weight=2.0, noise_step=0) == base
    assert tokens_of(models, some, form="cfg", weight=1.0) == base
    both: dict[str, Any] = {"form": "tita_vcd", "weights": {"faithful": 0.6}}
    assert tokens_of(models, some, **both, contrast=0.0) == alone
    assert tokens_of(models, some, **both, noise_step=0) == alone
    assert tokens_of(models, some, **both, contrast=5.0) != alone
    for form in FORMS:
        assert tokens_of(models, some, form=form, weight=0.0) == base
        assert tokens_of(models, some[:1], form="vcd", weight=1.0) == base[:1], "has no image"


def test_a_view_that_shows_the_same_changes_nothing(
    models: Models, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it runs: VCD with a noise of nothing is the base, up to rounding."""
    monkeypatch.setattr("tita.vlm.noise.noise_factors", lambda *_, **__: (1.0, 0.0))
    some = requests[1:5]
    assert tokens_of(models, some, form="vcd", weight=1.0) == tokens_of(models, some, weight=0.0)


def test_the_reward_drafts_for_both(
    models: Models, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With contrast beside a reward, each prompt is computed once, and the base verifies drafts in
    one forward over both of its views."""
    prompts = Counter[bool]()
    prefill = ModelRunner.prefill

    def counted(runner: ModelRunner, group: list[Any]) -> Any:
        prompts[runner.vlm.model is models.base.model] += len(group)
        return prefill(runner, group)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    guidance = Guidance(form="tita_vcd", weights={"faithful": 0.9}, contrast=0.1)
    request = dataclasses.replace(requests[1], guidance=guidance)
    engine = Engine(models)
    engine.draft_policy = Always(max_drafts=3)
    engine.generate([request])
    assert prompts == {True: 2, False: 1}
    assert engine.draft_policy.num_accepted > 0


def test_rewards_are_named_in_errors(models: Models, requests: list[Request]) -> None:
    for guidance, message in (
        (
            Guidance(weights={"polite": 0.1}),
            "no reward model 'polite'; choose from faithful, brief",
        ),
        (Guidance(weight=0.1), "one weight for 2 reward models; give weights of faithful, brief"),
    ):
        request = dataclasses.replace(requests[1], guidance=guidance)
        with pytest.raises(TitaError, match=message):
            Engine(models).generate([request])
    with pytest.raises(TitaError, match="form vcd uses no reward model; give one weight"):
        Guidance(form="vcd", weights={"brief": 0.1})
    with pytest.raises(TitaError, match="noise_step has no effect on form cfg; choose form vcd or"):
        Guidance.of(form="cfg", noise_step=900)
    with pytest.raises(TitaError, match="contrast has no effect on form vcd; choose form tita_vcd"):
        Guidance.of(form="vcd", contrast=0.5)
    with pytest.raises(TitaError, match="contrast is -1"):
        Guidance.of(form="tita_vcd", contrast=-1)
    with pytest.raises(TitaError, match="'reference' cannot be the name of a reward model"):
        Models(models.base, more={"reference": models.base})


def test_text_needs_a_question(base: VLM) -> None:
    """Prompts in a template have no place for it; in turns it comes before the last one's text."""
    guidance = Guidance(form="cfg", weight=0.5, text="a hint")
    with pytest.raises(BadConversation, match="not divided into turns; send a conversation"):
        Engine(Models(base)).generate([Request(raw="user: what ?", guidance=guidance)])
    image = PIL.Image.new("RGB", (32, 32))
    turns = (
        Turn(role="user", parts=(image, "what ?")), Turn(role="assistant", parts=("yes",)),
        Turn(role="user", parts=("colour ?",)),
    )  # fmt: skip
    engine = Engine(Models(base))
    prepared = engine.preparer.prepare(Request(turns=turns, guidance=guidance))
    added = (*turns[:2], Turn(role="user", parts=("a hint\ncolour ?",)))
    wanted = engine.preparer.prepare(Request(turns=added, guidance=Guidance(weight=0)))
    assert torch.equal(
        prepared.inputs["base/text"]["input_ids"], wanted.inputs["base"]["input_ids"]
    )


TWO = {"faithful": 0.3, "brief": 0.5}
SUMS: tuple[tuple[Guidance, int, dict[str, float]], ...] = (
    (Guidance(weights=TWO), 1, {"base": 0.2, "faithful": 0.3, "brief": 0.5}),
    (Guidance(weights=TWO, form="genarm"), 1, {"base": 1, "faithful": 0.3, "brief": 0.5}),
    (
        Guidance(weights=TWO, form="dpo"),
        1,
        {"base": 1, "faithful": 0.3, "brief": 0.5, "reference": -0.8},
    ),
    (Guidance(form="vcd", weight=1.0), 1, {"base": 2, "base/distorted": -1}),
    (
        Guidance(form="tita_vcd", weights={"brief": 0.5}, contrast=0.6),
        1,
        {"base": 0.8, "base/distorted": -0.3, "brief": 0.5},
    ),
    (Guidance(form="cfg", weight=2.5), 1, {"base": 2.5, "base/no-image": -1.5}),
    (Guidance(form="cfg", weight=0.8, text=TEXT), 1, {"base": 0.2, "base/text": 0.8}),
    *(
        (
            Guidance(form="m3id", weight=0.1),
            position,
            {"base": math.exp(0.1 * position), "base/no-image": 1 - math.exp(0.1 * position)},
        )
        for position in (1, 6)
    ),
)
"""Guidance, the position of a token, and the coefficients of the sum that it is sampled from."""


def test_sampling_follows_the_combined_distribution() -> None:
    """Chi-square over a toy vocabulary: every form, all of them in every batch."""
    names = ("base", "faithful", "brief", "reference", "base/distorted", "base/no-image")
    names += ("base/text",)
    torch.manual_seed(83)  # of four thousand, one with which every form differs from the base
    logits = dict(zip(names, torch.randn(len(names), 5), strict=True))
    number, size = 1500, 100
    counts = [Counter[int]() for _ in SUMS]
    for first in range(0, number, size):
        cases = [*itertools.product(range(first, first + size), enumerate(SUMS))]
        sequences = [
            sampled_sequence(
                guidance, rewards=("faithful", "brief"), seed=seed, num_tokens=position - 1
            )
            for seed, (_, (guidance, position, _)) in cases
        ]
        outputs = {}
        for name in names:
            rows = [row for row, (_, (_, (*_, parts))) in enumerate(cases) if name in parts]
            outputs[name] = SourceLogits(logits[name].repeat(len(rows), 1), rows)
        for chosen, (_, (case, _)) in zip(choose(sequences, outputs), cases, strict=True):
            assert chosen is not None
            counts[case][chosen.token] += 1
    base = logits["base"].softmax(-1)
    for (_, _, parts), count in zip(SUMS, counts, strict=True):
        total = sum(c * logits[name].log_softmax(-1) for name, c in parts.items())
        assert isinstance(total, torch.Tensor)
        assert _chi_square(count, total.softmax(-1), number) < 18.47  # 99.9 %, four degrees
        assert _chi_square(count, base, number) > 30, "the test can fail"


def _chi_square(counts: Counter[int], wanted: torch.Tensor, number: int) -> float:
    shares = enumerate(wanted.tolist())
    return sum((counts[t] - number * p) ** 2 / (number * p) for t, p in shares)


def test_a_form_expands_to_terms() -> None:
    no_image = Source("base", View(image="none"))
    (term,) = Guidance(form="m3id", weight=0.02).terms((), has_images=True)
    assert (term.source, term.against) == (no_image, BASE)
    assert [round(-term.at(t), 4) for t in (1, 50)] == [0.0202, 1.7183]
    assert -term.at(10**6) < 1e27, "stays in the range of float32"
    assert Guidance(form="cfg", weight=3).terms((), has_images=True) == (Term(no_image, -2, BASE),)
    assert Guidance.of(form="vcd") == Guidance(form="vcd", weight=1.0, plausibility=0.1)
    assert Guidance.of(form="tita") == Guidance()
    reward, view = (Guidance.of(form="tita_vcd", weight=0.25, contrast=2.0, noise_step=999)).terms(
        ("reward",), has_images=True
    )
    assert reward == Term(Source("reward"), 0.25, against=BASE)
    assert view == Term(Source("base", View(image="distorted", noise_step=999)), -1.5, against=BASE)
