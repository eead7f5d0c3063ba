"""Forms and the plausibility bound in the engine equal their definitions."""

import copy
import dataclasses
import itertools
from typing import get_args

import pytest
import torch

from tests.align.always import Always
from tests.align.definition import asked, by_definition, perturbed
from tita.align import Engine, Guidance, Request, Sampling
from tita.align.forms import FORMS
from tita.cli.guidance_options import FormOption
from tita.errors import TitaError
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, Models
from tita.vlm.prompts import Prompt

LENGTH = 6


@pytest.fixture(scope="module")
def reference(reward: VLM) -> VLM:
    return perturbed(reward, seed=1)


@pytest.fixture(scope="module")
def engine(base: VLM, reward: VLM, reference: VLM) -> Engine:
    return Engine(Models(base, reward, reference))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """All forms, weights and bounds, on questions of different lengths."""
    questions = asked(6, sampling=Sampling(max_new_tokens=LENGTH))
    ways = itertools.product(FORMS, (0.0, 0.5, 1.6), (0.0, 0.3))
    return [
        dataclasses.replace(
            request, guidance=Guidance(form=form, weight=weight, plausibility=alpha)
        )
        for request, (form, weight, alpha) in zip(itertools.cycle(questions), ways, strict=False)
    ]


def test_all_forms_equal_the_definition_in_one_batch(
    engine: Engine, base: VLM, reward: VLM, reference: VLM, requests: list[Request]
) -> None:
    models = Models(base, reward, reference)
    wanted = [by_definition(models, request) for request in requests]
    assert [list(answer.token_ids) for answer in engine.generate(requests)] == wanted
    drafting = Engine(models)
    drafting.draft_policy = Always(max_drafts=3)
    assert [list(drafting.generate([each])[0].token_ids) for each in requests] == wanted
    assert drafting.draft_policy.num_drafted > 0


def test_forms_make_a_difference(engine: Engine, requests: list[Request]) -> None:
    def answers_with(**how: object) -> list[tuple[int, ...]]:
        asked = [
            dataclasses.replace(
                r,
                guidance=dataclasses.replace(r.guidance, **{"plausibility": 0.0, **how}),  # type: ignore[arg-type]
            )
            for r in requests
        ]
        return [answer.token_ids for answer in engine.generate(asked)]

    # From weight 1 on, `tita_vcd` has no contrast.
    weights = {form: 0.8 if form == "tita_vcd" else 1.6 for form in FORMS}
    answers = [answers_with(form=form, weight=weights[form]) for form in FORMS]
    answers += [answers_with(form="dpo", weight=1.6, plausibility=0.9), answers_with(weight=0.0)]
    assert all(one != other for one, other in itertools.combinations(answers, 2))
    # With alpha 1 only the base's most likely token is plausible.
    assert answers_with(form="dpo", weight=1.6, plausibility=1.0) == answers_with(weight=0.0)


def test_missing_reference_is_an_error(base: VLM, reward: VLM) -> None:
    with pytest.raises(TitaError, match="form dpo without a reference model; give the reward"):
        Engine(Models(base, reward)).generate(
            [Request(question="what number ?", guidance=Guidance(form="dpo"))]
        )
    (error,) = Engine(Models(base, reward)).generate(
        [Request(question="what number ?", guidance=Guidance(form="dpo"))], return_errors=True
    )
    assert "form dpo without a reference model" in str(error)


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(TitaError, match=r"no guidance form 'sum'; choose tita, genarm, .*m3id"):
        Guidance(form="sum")


def test_the_help_names_every_form() -> None:
    option = get_args(FormOption)[1]
    assert option.help == f"Guidance form: {', '.join(FORMS)}."


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_plausibility_is_between_0_and_1(alpha: float) -> None:
    with pytest.raises(TitaError, match="plausibility is"):
        Guidance(plausibility=alpha)


def test_special_tokens_are_added_as_by_transformers(base: VLM) -> None:
    """Some templates contain the beginning-of-text token, others leave it to the tokenizer."""
    import PIL.Image
    from tokenizers.processors import TemplateProcessing

    image = PIL.Image.new("RGB", (32, 32))
    prompt = Prompt(text="what number ?", images=(image,))
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt.text}]
    processor = copy.deepcopy(base.processor)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    for template in (
        processor.chat_template,
        processor.chat_template.replace("{{ bos_token }}", ""),
    ):
        processor.chat_template = template
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        ours = prepare(dataclasses.replace(base, processor=processor), [prompt])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert ours["input_ids"][0, :2].tolist().count(1) == 1


def test_explained_base_answer_needs_no_reference(base: VLM, reward: VLM, engine: Engine) -> None:
    """At weight 0 no form runs the reference model, with `explain` neither."""
    alone = Request(
        question="what number ?", guidance=Guidance(weight=0.0, form="dpo"), explain=True
    )
    (answer,) = engine.generate([alone])
    assert answer.token_ids == Engine(Models(base)).generate([alone])[0].token_ids
