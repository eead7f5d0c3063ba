"""Other families than LLaVA-1.5, tiny and random: through their own processors and caches."""

import copy
import dataclasses

import PIL.Image
import pytest
import torch

from tests.families import FAMILIES, built
from tita.align import Engine, EngineOptions, Request, Sampling
from tita.vlm import VLM, prepare

LENGTH = 8


def vlm(name: str, *, seed: int) -> VLM:
    """Weights so large that what is likeliest is no matter of rounding."""
    model, processor = built(name)
    dice = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = 0.3 * torch.randn(weight.shape, generator=dice)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return VLM(name=name, model=model.eval(), processor=processor, image_aspect="keep")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def models(request: pytest.FixtureRequest) -> tuple[VLM, VLM]:
    return vlm(request.param, seed=1), vlm(request.param, seed=2)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Images of several forms, none, and two in one prompt; questions of several lengths."""
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
        Request(question=text, images=images, weight=0.5, sampling=sampling)
        for text, images in zip(words, shown, strict=True)
    ]


def generated(vlm: VLM, request: Request) -> list[int]:
    """transformers' own greedy answer."""
    inputs = prepare(vlm, [request.prompt])
    output = vlm.model.generate(
        **inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    found: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("room", [0, 2**20])
def test_rows_say_what_generate_says(
    models: tuple[VLM, VLM], requests: list[Request], room: int
) -> None:
    engine = Engine(*models, options=EngineOptions(prefix_cache_bytes=room))
    for weight, alone in zip((0.0, 1.0), models, strict=True):
        asked = [dataclasses.replace(request, weight=weight) for request in requests]
        wanted = [generated(alone, request) for request in requests]
        assert len({tuple(each) for each in wanted}) > 1
        for _ in range(2):
            assert [list(answer.token_ids) for answer in engine.generate(asked)] == wanted


def test_a_batch_says_what_its_rows_say(models: tuple[VLM, VLM], requests: list[Request]) -> None:
    engine = Engine(*models)
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone
    one_by_one = dict(engine.answer_each(iter(requests), batch_size=2))
    assert [one_by_one[n] for n in range(len(requests))] == alone


def test_a_bigger_output_layer_changes_nothing(
    models: tuple[VLM, VLM], requests: list[Request]
) -> None:
    """Reward models' vocabularies are rounded up otherwise than their bases'."""
    base, reward = models
    wider = copy.deepcopy(reward.model)
    wider.resize_token_embeddings(128, mean_resizing=False)
    rounded = dataclasses.replace(reward, model=wider.eval())
    assert Engine(base, rounded).generate(requests) == Engine(base, reward).generate(requests)
