"""Models share inputs exactly where their processors would make the same."""

import copy
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest

from tita.align import EngineOptions, Guidance, Request
from tita.align.prompts import PreparedRequest, Preparer, PromptTooLong
from tita.align.views import image_digest
from tita.demo.models import demo_model_path
from tita.vlm.inputs import prepare, prepare_alike
from tita.vlm.loading import VLM, Models, load_vlm
from tita.vlm.noise import NOISE_KEY, SevaNoise

IMAGE = PIL.Image.new("RGB", (40, 60), "red")
OTHER = PIL.Image.new("RGB", (60, 40), "blue")
REQUEST = Request(question="what number ?", images=(IMAGE,), guidance=Guidance(form="dpo"))
REQUEST_OF_BASE = replace(REQUEST, guidance=Guidance(weight=0.0))


@pytest.fixture(scope="module")
def base() -> VLM:
    return load_vlm(str(demo_model_path("base")))


@pytest.fixture(scope="module")
def reward() -> VLM:
    return load_vlm(str(demo_model_path("reward")))


def _counted(vlm: VLM) -> tuple[VLM, list[None]]:
    """The model with its own processor that counts calls."""
    calls: list[None] = []

    class Counting(type(vlm.processor)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            calls.append(None)
            return super().__call__(*arguments, **options)

    processor = copy.deepcopy(vlm.processor)
    processor.__class__ = Counting
    return replace(vlm, processor=processor), calls


def test_one_call_serves_all_models_that_prepare_alike(base: VLM) -> None:
    vlm, calls = _counted(base)
    prepared = Preparer(Models(vlm, vlm, vlm)).prepare(REQUEST)
    assert len(calls) == 1
    assert prepared.inputs["reward"] is prepared.inputs["base"]
    assert prepared.inputs["reference"] is prepared.inputs["base"]


def test_models_from_different_folders_prepare_alike(base: VLM, reward: VLM) -> None:
    prepare(reward, [REQUEST.prompt, REQUEST.prompt])  # the last padding is no setting
    assert prepare_alike(base, reward)
    prepared = Preparer(Models(base, reward, reward)).prepare(REQUEST)
    assert prepared.inputs["reward"] is prepared.inputs["base"]
    expected = prepare(reward, [REQUEST.prompt])
    assert all((prepared.inputs["base"][name] == expected[name]).all() for name in expected)


def _size(processor: Any) -> None:
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]


def _template(processor: Any) -> None:
    processor.chat_template += " "


def _words(processor: Any) -> None:
    processor.tokenizer.add_tokens(["what number"])


def _begin(processor: Any) -> None:
    processor.tokenizer.bos_token = processor.tokenizer.eos_token


@pytest.mark.parametrize("change", [_size, _template, _words, _begin])
def test_any_other_setting_prevents_sharing(
    base: VLM, reward: VLM, change: Callable[[Any], None]
) -> None:
    processor = copy.deepcopy(reward.processor)
    change(processor)
    model = copy.deepcopy(reward.model)
    model.resize_token_embeddings(len(processor.tokenizer))
    other = replace(reward, processor=processor, model=model)
    assert not prepare_alike(base, other)
    prepared = Preparer(Models(base, other, other)).prepare(REQUEST)
    for inputs, vlm in ((prepared.inputs["base"], base), (prepared.inputs["reward"], other)):
        expected = prepare(vlm, [REQUEST.prompt])
        assert inputs is not None
        assert all((inputs[name] == expected[name]).all() for name in expected)
    assert prepared.inputs["reference"] is prepared.inputs["reward"]


def test_another_image_aspect_prevents_sharing(base: VLM) -> None:
    assert not prepare_alike(base, replace(base, image_aspect="keep"))


def test_reward_images_prevent_sharing(base: VLM) -> None:
    requests = [replace(REQUEST, reward_images=(OTHER,)), REQUEST]
    shown, plain = Preparer(Models(base, base, base)).prepare_all(requests)
    assert not isinstance(shown, Exception)
    assert not isinstance(plain, Exception)
    assert plain.inputs["reward"] is plain.inputs["base"]
    expected = prepare(base, [replace(REQUEST, images=(OTHER,)).prompt])
    assert (shown.inputs["reward"]["pixel_values"] == expected["pixel_values"]).all()
    assert not (shown.inputs["base"]["pixel_values"] == expected["pixel_values"]).all()
    assert shown.inputs["reference"] is shown.inputs["reward"]
    digests = shown.image_digests
    assert digests["base"] == plain.image_digests["base"] == plain.image_digests["reward"]
    assert digests["reward"] != digests["base"]


def test_the_digest_of_a_plain_image_is_that_of_its_size_and_pixels() -> None:
    """The noise of `vcd` is made from it, so answers would change with it."""
    noisy = IMAGE.copy()
    noisy.info[NOISE_KEY] = SevaNoise(step=500, seed=1)
    plain, other = (image_digest(replace(REQUEST, images=(each,))) for each in (IMAGE, noisy))
    assert plain == hashlib.sha256(b"(40, 60)" + IMAGE.tobytes()).hexdigest()
    assert other != plain, "caches must not take the noisy image for the plain one"


def test_clones_run_concurrently_with_equal_results(base: VLM, reward: VLM) -> None:
    one = Preparer(Models(base, reward, reward))
    other = one.clone()
    assert other._vlms["base"].processor is not one._vlms["base"].processor
    assert other._vlms["reward"].processor is other._vlms["base"].processor, (
        "a shared processor is copied once"
    )
    expected, words = one.prepare(REQUEST), "what number ? " * 10
    with one._lock, ThreadPoolExecutor() as pool:
        found = pool.submit(other.prepare, REQUEST).result(timeout=20)
    for name in expected.inputs["base"]:
        assert (found.inputs["base"][name] == expected.inputs["base"][name]).all()
    # Fast tokenizers raise when two threads use them at once, and each call sets the padding.
    requests = [[Request(question=words), REQUEST], [REQUEST, Request(question=words)]]
    with ThreadPoolExecutor() as pool:
        for _ in range(10):
            found_all = list(pool.map(Preparer.prepare_all, (one, other), requests))
            assert all(isinstance(each, PreparedRequest) for both in found_all for each in both)


def test_prompt_and_answer_fit_the_given_length(base: VLM) -> None:
    """Where an engine holds fewer tokens than the models' context."""
    models = Models(base)
    length = Preparer(models).prepare(REQUEST_OF_BASE).num_prompt_tokens
    bounded = Preparer(models, EngineOptions(max_model_len=length + 9))
    assert bounded.context_length == length + 9 < Preparer(models).context_length
    assert bounded.prepare(REQUEST_OF_BASE).max_new_tokens == 9
    with pytest.raises(PromptTooLong, match=f"has {length} tokens, more than {length - 1}"):
        Preparer(models, EngineOptions(max_model_len=length)).prepare(REQUEST_OF_BASE)
    longer = EngineOptions(max_model_len=base.context_length + 1)
    assert Preparer(models, longer).context_length == base.context_length
