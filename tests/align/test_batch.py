"""Sequences of a running batch get the same answers as alone, and as from the engine."""

import dataclasses
import re
from typing import Any

import PIL.Image
import PIL.ImageDraw
import pytest
import torch

from tita.align import Engine, EngineOptions, Guidance, Request, Sampling, TokenOutput
from tita.align.batch import Batch
from tita.align.prompts import Preparer
from tita.vlm.loading import Models

QUESTIONS = ["what color is the circle ?", "is there a 7 ?", "describe the image .", "what"]
ROOM = 2**20
COLOURS = ["red", "blue", "green", "yellow"]


def image(colour: str) -> PIL.Image.Image:
    shown = PIL.Image.new("RGB", (64, 64), "white")
    PIL.ImageDraw.Draw(shown).ellipse((16, 16, 48, 48), fill=colour)
    return shown


def request(index: int, *, weight: float, colour: str | None = None) -> Request:
    return Request(
        question=QUESTIONS[index % 4],
        images=(image(colour or COLOURS[index % 4]),),
        guidance=Guidance(weight=weight),
        sampling=Sampling(max_new_tokens=24),
    )


def run(
    batch: Batch, preparer: Preparer, requests: list[Request], *, stagger: int = 0
) -> list[str]:
    """Answers to requests that are admitted one after another, `stagger` steps apart."""
    texts: dict[object, str] = {}
    left = list(enumerate(requests))
    while left or len(batch):
        for key, each in left[:1] if stagger else left:
            texts[key] = ""
            batch.admit(key, preparer.prepare(each))
        del left[: 1 if stagger else len(left)]
        for _ in range(stagger or 1):
            for key, output in batch.step():
                assert isinstance(output, TokenOutput), output
                texts[key] += output.text
    return [texts[key] for key in range(len(requests))]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prefill_tokens", [512, 3])
def test_answers_equal_the_engines(models: Models, weight: float, prefill_tokens: int):
    preparer = Preparer(models)
    requests = [request(index, weight=weight) for index in range(6)]
    wanted = [answer.text for answer in Engine(models).generate(requests)]
    assert any(wanted)
    for stagger in (0, 1, 3):
        batch = Engine(models, EngineOptions(prefill_tokens=prefill_tokens)).new_batch()
        assert run(batch, preparer, requests, stagger=stagger) == wanted
        assert len(batch) == 0
        assert batch.runners["base"].num_cells == 0


def test_masks_follow_the_rows(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mask has the columns in which the cache holds tokens, as rows come, grow and leave."""
    monkeypatch.setattr("tita.align.model_runner._MASK_SPARE", 5)
    right = []

    def check(_: object, __: object, inputs: dict[str, Any]) -> None:
        mask, cache = inputs["attention_mask"], inputs["past_key_values"]
        num_new = inputs["input_ids"].shape[1]
        if mask is None or num_new > 1:
            return
        keys, _ = cache.layers[0].used
        filled = torch.nn.functional.pad(keys.any(-1).any(1), (0, 1), value=True)
        # A failed assertion would be taken for a failed step, and the step repeated.
        right.append(torch.equal(mask.bool(), filled))

    sampling = Sampling(max_new_tokens=16, ignore_end=True)
    requests = [
        dataclasses.replace(request(index, weight=0.3), sampling=sampling) for index in range(6)
    ]
    with models.base.model.register_forward_pre_hook(check, with_kwargs=True):
        run(Engine(models).new_batch(), Preparer(models), requests, stagger=4)
    assert len(right) > 20
    assert all(right)


def test_requests_that_come_together_have_memory_for_their_rows_alone(models: Models) -> None:
    num_rows = set()

    def look(_: object, __: object, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].shape[1] == 1:
            num_rows.add(len(inputs["past_key_values"].layers[0].keys))

    sampling = Sampling(max_new_tokens=16, ignore_end=True)
    requests = [
        dataclasses.replace(request(index, weight=0.3), sampling=sampling) for index in range(7)
    ]
    with models.base.model.register_forward_pre_hook(look, with_kwargs=True):
        run(Engine(models, EngineOptions(prefill_tokens=3)).new_batch(), Preparer(models), requests)
    assert max(num_rows) == 7


def test_different_weights_share_a_batch(models: Models):
    preparer = Preparer(models)
    requests = [request(index, weight=(0.0, 0.4, 1.0)[index % 3]) for index in range(6)]
    alone = [run(Engine(models).new_batch(), preparer, [each])[0] for each in requests]
    assert run(Engine(models).new_batch(), preparer, requests, stagger=2) == alone


def test_cached_images_are_not_encoded_again(models: Models):
    batch = Engine(models, EngineOptions(prefix_cache_bytes=ROOM)).new_batch()
    preparer = Preparer(models)
    looks = 0

    def count(_: object, pixels: tuple[torch.Tensor], __: object) -> None:
        nonlocal looks
        looks += len(pixels[0])

    hook = models.base.model.model.vision_tower.register_forward_hook(count)
    try:
        requests = [request(index, weight=0.3, colour="red") for index in range(4)]
        again = run(batch, preparer, requests, stagger=1)
        assert looks == 1
        fresh = Engine(models).new_batch()
        assert run(fresh, preparer, requests) == again
        assert looks == 5
        run(batch, preparer, [request(0, weight=0.3, colour="blue")])
        assert looks == 6
    finally:
        hook.remove()
    assert 0 < batch.prefix_cache.num_bytes <= ROOM


def test_prefix_cache_stays_within_its_size(models: Models):
    room = 40_000
    batch = Engine(models, EngineOptions(prefix_cache_bytes=room)).new_batch()
    preparer = Preparer(models)
    run(batch, preparer, [request(index, weight=0.3) for index in range(4)])
    assert 0 < batch.prefix_cache.num_bytes <= room


def test_an_image_that_the_prefix_cache_cannot_hold_is_reported(
    models: Models, caplog: pytest.LogCaptureFixture
):
    """As those of LLaVA-1.5-7B with 256 MiB; once, and the answers are the same."""
    batch = Engine(models, EngineOptions(prefix_cache_bytes=2**10)).new_batch()
    preparer = Preparer(models)
    requests = [request(index, weight=0.3) for index in range(3)]
    found = run(batch, preparer, requests)
    assert found == run(Engine(models).new_batch(), preparer, requests)
    assert batch.prefix_cache.num_bytes == 0
    [record] = [each for each in caplog.records if "prefix cache" in each.message]
    assert re.search(r"have \d+,\d+ bytes, more than the prefix cache \(1,024\)", record.message)


def test_release_at_any_point(models: Models):
    batch = Engine(models, EngineOptions(prefill_tokens=3)).new_batch()
    preparer = Preparer(models)
    alone = run(batch, preparer, [request(2, weight=0.3)])
    for key in ("entering", "writing", 0):
        batch.admit(key, preparer.prepare(request(2, weight=0.3)))
        if key != 0:
            for _ in range(6 if key == "writing" else 1):
                batch.step()
            batch.release(key)
    text = ""
    while len(batch):
        text += "".join(output.text for _, output in batch.step())
    assert [text] == alone


@pytest.mark.parametrize("gone", [{0}, {1, 2}, {3}, {0, 3}])
def test_release_does_not_affect_others(models: Models, gone: set[int]):
    preparer = Preparer(models)
    on = Sampling(max_new_tokens=12, ignore_end=True)
    requests = [dataclasses.replace(request(index, weight=0.3), sampling=on) for index in range(4)]
    alone = [run(Engine(models).new_batch(), preparer, [each])[0] for each in requests]
    batch, texts = Engine(models).new_batch(), [""] * 4
    for key, each in enumerate(requests):
        batch.admit(key, preparer.prepare(each))
    for number in range(20):
        for key, output in batch.step():
            texts[key] += output.text
        if number == 4:
            for key in gone:
                batch.release(key)
    assert [t for n, t in enumerate(texts) if n not in gone] == [
        t for n, t in enumerate(alone) if n not in gone
    ]


def test_nan_in_one_sequence_does_not_affect_others(models: Models):
    batch = Engine(models).new_batch()
    preparer = Preparer(models)
    alone = run(batch, preparer, [request(0, weight=0.3)])
    poisoned = preparer.prepare(request(1, weight=0.3))
    poisoned.inputs["base"]["pixel_values"] = poisoned.inputs["base"]["pixel_values"] * float("nan")
    batch.admit("bad", poisoned)
    batch.admit("good", preparer.prepare(request(0, weight=0.3)))
    text, errors = "", []
    while len(batch):
        for key, output in batch.step():
            if key == "good":
                text += output.text
            else:
                errors.append(output)
    assert [text] == alone
    assert ["NaN" in str(error) for error in errors] == [True]
