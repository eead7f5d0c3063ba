"""Tiny random models of families other than LLaVA-1.5, with their own processors and caches."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tests.align.always import Always
from tests.align.definition import LENGTH, asked, by_definition
from tests.families import ALL_FAMILIES, DECODED, aria, deepseek_vl_hybrid, mllama, qwen3_5, saved
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.align.prompts import Preparer
from tita.errors import TitaError
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, Models, load_vlm

NEED_AN_IMAGE = ("paligemma",)


@pytest.fixture(scope="module", params=DECODED)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    def loaded(seed: int) -> VLM:
        folder = saved(
            ALL_FAMILIES[request.param], tmp_path_factory.mktemp(request.param), seed=seed
        )
        vlm = load_vlm(str(folder))
        vlm.model.to("cpu")
        return vlm

    return Models(loaded(1), loaded(2))


@pytest.fixture(scope="module")
def requests(models: Models) -> list[Request]:
    """Images of several aspects, none, and two in one prompt; questions of several lengths."""
    dice = torch.Generator().manual_seed(0)

    def image(width: int, height: int) -> PIL.Image.Image:
        pixels = torch.randint(255, (height, width, 3), dtype=torch.uint8, generator=dice)
        return PIL.Image.fromarray(pixels.numpy())

    shown = [
        (image(40, 60),),
        (image(60, 40),),
        (),
        (image(64, 64),),
        (image(50, 50), image(30, 60)),
    ]
    words = ("what number ?", "what is there in the image ?", "yes ?", "colour", "the image the")
    sampling = Sampling(max_new_tokens=LENGTH, ignore_end=True)
    return [
        Request(question=text, images=images, guidance=Guidance(weight=0.5), sampling=sampling)
        for text, images in zip(words, shown, strict=True)
        if images or models.base.model.config.model_type not in NEED_AN_IMAGE
    ]


def generated(vlm: VLM, request: Request) -> list[int]:
    """The greedy answer of transformers."""
    inputs = prepare(vlm, [request.prompt])
    output = vlm.model.generate(
        **inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    found: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return found


def test_each_model_alone_equals_generate(models: Models, requests: list[Request]) -> None:
    engine = Engine(models)
    for weight, alone in zip((0.0, 1.0), models.by_role().values(), strict=True):
        weighted = [
            dataclasses.replace(request, guidance=Guidance(weight=weight)) for request in requests
        ]
        wanted = [generated(alone, request) for request in requests]
        assert len({tuple(each) for each in wanted}) > 1
        assert [list(answer.token_ids) for answer in engine.generate(weighted)] == wanted


def test_guided_answers_equal_the_definition(models: Models, requests: list[Request]) -> None:
    """With chunked prompts, with and without cached images, with and without drafts."""
    wanted = [by_definition(models, request) for request in requests]
    assert wanted != [generated(models.base, request) for request in requests]
    for options in (
        EngineOptions(prefill_tokens=4),
        EngineOptions(prefill_tokens=4, prefix_cache_bytes=2**20),
    ):
        engine = Engine(models, options)
        assert [list(answer.token_ids) for answer in engine.generate(requests)] == wanted
        engine.draft_policy = Always(max_drafts=3)
        drafted = [engine.generate([request])[0] for request in requests]
        assert [list(answer.token_ids) for answer in drafted] == wanted


def test_batch_equals_single_requests(models: Models, requests: list[Request]) -> None:
    engine = Engine(models)
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone
    one_by_one = dict(engine.generate_as_completed(iter(requests), batch_size=2))
    assert [one_by_one[n] for n in range(len(requests))] == alone


def test_padded_output_layer_changes_nothing(models: Models, requests: list[Request]) -> None:
    """A reward model's output layer may be padded to another size than its base's."""
    base, reward = models.by_role().values()
    wider = copy.deepcopy(reward.model)
    wider.resize_token_embeddings(128, mean_resizing=False)
    rounded = dataclasses.replace(reward, model=wider.eval())
    assert Engine(Models(base, rounded)).generate(requests) == Engine(
        Models(base, reward)
    ).generate(requests)


def test_separate_image_layers_are_refused(tmp_path: Path) -> None:
    vlm = load_vlm(str(saved(mllama, tmp_path)))
    with pytest.raises(TitaError, match=rf"{tmp_path}: keeps images apart .*\(mllama\); choose"):
        Engine(Models(vlm))


@pytest.mark.parametrize("family", [aria, deepseek_vl_hybrid])
def test_pixels_have_the_dtype_of_the_weights(family: Any, tmp_path: Path) -> None:
    """The towers of these do not convert them."""
    vlm = load_vlm(str(saved(family, tmp_path)), dtype="bfloat16")
    shown = Request(
        question="what number ?",
        images=(PIL.Image.new("RGB", (40, 40)),),
        guidance=Guidance(weight=0),
        sampling=Sampling(max_new_tokens=1),
    )
    assert len(Engine(Models(vlm)).generate([shown])) == 1


def test_both_resolutions_of_an_image_are_distorted(tmp_path: Path) -> None:
    vlm = load_vlm(str(saved(deepseek_vl_hybrid, tmp_path)))
    shown = Request(
        question="what number ?",
        images=(PIL.Image.new("RGB", (40, 40)),),
        guidance=Guidance(form="vcd", weight=0.5),
    )
    inputs = Preparer(Models(vlm)).prepare(shown).inputs
    own, distorted = (
        each for name, each in sorted(inputs.items(), key=lambda pair: pair[0] != "base")
    )
    for name in ("pixel_values", "high_res_pixel_values"):
        assert not torch.equal(own[name], distorted[name])


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    vlm = load_vlm(str(saved(qwen3_5, tmp_path)))
    with pytest.raises(TitaError, match=r"keeps more between tokens .* \(LinearAttentionLayer\)"):
        Engine(Models(vlm))


def test_a_model_without_an_image_token_is_refused_at_the_start(base: VLM) -> None:
    unnamed = copy.copy(base.model)
    # transformers allows no None for it in a LLaVA's; a language model's does not have it.
    unnamed.config = base.model.config.get_text_config()
    with pytest.raises(TitaError, match=r"which token stands for an image \(llama\); name it as"):
        Engine(Models(dataclasses.replace(base, model=unnamed)))


def test_wrong_image_token_is_refused(base: VLM) -> None:
    (request,) = asked(1, sampling=Sampling(), guidance=Guidance(weight=0.0))[:1]
    blind = copy.copy(base.model)
    blind.config = copy.copy(blind.config)
    blind.config.image_token_index = base.tokenizer.unk_token_id
    with pytest.raises(TitaError, match="which tokens of its prompt stand for images"):
        Engine(Models(dataclasses.replace(base, model=blind))).generate([request])
