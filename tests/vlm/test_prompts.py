"""Prompts: templates, escaped control tokens, and batches of inputs."""

import copy
import dataclasses
from typing import Any

import PIL.Image
import pytest
import torch

from tests.families import built
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.vlm.inputs import prepare, prepare_each
from tita.vlm.loading import VLM, load_vlm
from tita.vlm.prompts import BadConversation, Prompt, Turn, prompt_text

IMAGE = PIL.Image.new("RGB", (40, 60), "red")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm(str(demo_model_path("reward")))


@pytest.mark.parametrize(
    "words", ["<image>", "<image> <image>", "</s>", "a</s><s>b", "<pad>", "< image>"]
)
def test_control_tokens_in_text_are_escaped(vlm: VLM, words: str) -> None:
    (row,) = prepare_each(vlm, [Prompt(text=f"what {words} ?", images=(IMAGE,))])
    ids = row["input_ids"][0].tolist()
    assert ids.count(vlm.processor.image_token_id) == 4
    assert vlm.tokenizer.eos_token_id not in ids
    assert vlm.tokenizer.pad_token_id not in ids
    assert ids.count(vlm.tokenizer.bos_token_id) == 1


def test_control_tokens_of_other_families_are_escaped() -> None:
    _, processor = built("qwen2_vl")
    text = prompt_text(
        processor, Prompt(text="a <|image_pad|> and <|vision_end|>", images=(IMAGE,))
    )
    assert text.count("<|image_pad|>") == 1
    assert text.count("<|vision_end|>") == 1
    assert "< |image_pad|>" in text


def test_control_tokens_divided_among_texts_are_escaped() -> None:
    """The template of Qwen2-VL joins the texts of a message."""
    processor = copy.deepcopy(built("qwen2_vl")[1])
    processor.chat_template = processor.chat_template.replace(
        " {{ c['text'] }} ", "{{ c['text'] }}"
    )
    parts = ("a <|vision", "_end|><|image", "_pad|> b", IMAGE, "c", "d")
    text = prompt_text(processor, Prompt(turns=(Turn(role="user", parts=parts),)))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"a <|vision _end|><|image _pad|> b{image}cd"


def test_rows_of_a_batch_equal_single_prompts(vlm: VLM) -> None:
    texts = ("what number ?", "is there a 7 in the image ?", "yes")
    prompts = [Prompt(text=text, images=(IMAGE,)) for text in texts]
    for row, prompt in zip(prepare_each(vlm, prompts), prompts, strict=True):
        alone = prepare(vlm, [prompt])
        assert row.keys() == alone.keys()
        assert all((row[name] == alone[name]).all() for name in alone)


class WithLocalParts:
    """A processor that adds parts of wide images, and their number, as Step 3.7's does."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: Any, **options: Any) -> Any:
        found = self._processor(images=images, **options)
        numbers = [2 * (image.width > image.height) for (image,) in images]
        parts = [n * torch.ones(number, 4) for n, number in enumerate(numbers)]
        found["num_local_patches"] = torch.tensor(numbers)
        found["pixel_values_local"] = torch.cat(parts)
        return found


def test_rows_equal_single_prompts_with_a_number_of_parts_per_image(vlm: VLM) -> None:
    parted = dataclasses.replace(vlm, processor=WithLocalParts(vlm.processor), image_aspect="keep")
    images = (IMAGE.resize((60, 20)), IMAGE)
    prompts = [Prompt(text="what number ?", images=(image,)) for image in images]
    parts = [len(row["pixel_values_local"]) for row in prepare_each(parted, prompts)]
    assert parts == [2, 0]


def test_raw_prompts_use_no_template(vlm: VLM) -> None:
    raw = Prompt(raw="user: <image> what ? assistant:", images=(IMAGE,))
    assert prompt_text(vlm.processor, raw) == raw.raw
    with pytest.raises(BadConversation, match=r"number of images \(0\) does not match"):
        prompt_text(vlm.processor, Prompt(raw=raw.raw))


def test_template_errors_are_reported(vlm: VLM) -> None:
    processor = copy.copy(vlm.processor)
    processor.chat_template = "{{ raise_exception('no system role') }}"
    turns = (Turn(role="system", parts=("x",)),)
    with pytest.raises(BadConversation, match=r"does not accept this conversation.*no system role"):
        prompt_text(processor, Prompt(turns=turns))
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(BadConversation, match="does not accept images here"):
        prompt_text(processor, Prompt(text="x", images=(IMAGE,)))
    processor.chat_template = None
    with pytest.raises(TitaError, match="some-model: has no chat template"):
        prompt_text(processor, Prompt(text="x"), where="some-model")


def test_processor_errors_are_reported() -> None:
    model, processor = built("qwen2_vl")
    vlm = VLM(name="q", model=model, processor=processor, image_aspect="keep")
    thin = PIL.Image.new("RGB", (1000, 2))
    with pytest.raises(BadConversation, match=r"processor refuses it .*aspect ratio"):
        prepare(vlm, [Prompt(text="x", images=(thin,))])
