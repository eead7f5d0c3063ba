"""Training, token counting and inference give a model the same images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, saved
from tita.data.lengths import load_length_limit
from tita.demo.models import demo_model_path
from tita.recipes import ImageAspect, TrainRecipe
from tita.storage import open_store
from tita.train.collators import PairCollator
from tita.train.model import save_processor
from tita.train.training_data import (
    TrainInputs,
    count_tokens,
    make_dataset,
    read_inputs,
)
from tita.vlm.images import open_image
from tita.vlm.inputs import Inputs as Tensors
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, load_vlm
from tita.vlm.processors import load_processor
from tita.vlm.prompts import Prompt

SIZE = (130, 50)
QUESTION, CHOSEN, REJECTED = "What number is written?", "seven", "one two three"


@pytest.fixture(params=["llava", "qwen2_vl"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "llava":
        return Path(shutil.copytree(demo_model_path("reward"), tmp_path / "model"))
    (tmp_path / "model").mkdir()
    return saved(FAMILIES[request.param], tmp_path / "model")


def inputs_of(model: Path, wanted: ImageAspect) -> TrainInputs:
    """A pair with a wide image of two colours, as `train-dpo` reads it."""
    root = model.parent
    image = Image.new("RGB", SIZE, "red")
    image.paste("blue", (0, 0, SIZE[0] // 2, SIZE[1]))
    image.save(root / "a.png")
    row = {"image": "a.png", "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
    (root / "pairs.jsonl").write_text(json.dumps(row))
    recipe = TrainRecipe(model=str(model), pairs=str(root / "pairs.jsonl"), image_aspect=wanted)
    return read_inputs(recipe, store=open_store(str(root / "store")))


def trained_on(inputs: TrainInputs) -> tuple[dict[str, Any], int]:
    """The batch of one step, and the number of tokens that preflight counts."""
    processor = load_processor(inputs.model, where="model")
    rows = make_dataset(
        inputs.pairs, images=inputs.images, processor=processor, image_aspect=inputs.image_aspect
    )
    return PairCollator(processor)([rows[0]]), next(count_tokens(rows, processor=processor)).total


def asked(vlm: VLM) -> Tensors:
    vlm.model.to("cpu")
    image = open_image(Path(vlm.name).parent / "a.png")
    return prepare(vlm, [Prompt(text=QUESTION, images=(image,))])


def same(batch: dict[str, Any], shown: Tensors) -> bool:
    """Whether the chosen half of a batch has the images of inference."""
    num_tokens, num_pixels = shown["input_ids"].shape[1], len(shown["pixel_values"])
    assert torch.equal(batch["input_ids"][:1, :num_tokens], shown["input_ids"])
    return torch.equal(batch["pixel_values"][:num_pixels], shown["pixel_values"])


@pytest.mark.parametrize("wanted", ["auto", "pad", "keep"])
def test_training_counting_and_inference_agree(model: Path, wanted: ImageAspect) -> None:
    inputs = inputs_of(model, wanted)
    batch, num_tokens = trained_on(inputs)
    vlm = load_vlm(str(model), image_aspect=wanted)
    assert inputs.image_aspect == vlm.image_aspect
    assert same(batch, asked(vlm))
    count = load_length_limit(str(model), image_aspect=wanted).count
    assert count(QUESTION, [CHOSEN, REJECTED], size=SIZE) == num_tokens
    others = {"pad": "keep", "keep": "pad"}
    other = load_vlm(str(model), image_aspect=others[vlm.image_aspect])  # type: ignore[arg-type]
    assert not torch.equal(asked(other)["pixel_values"], asked(vlm)["pixel_values"])


@pytest.mark.parametrize("wanted", ["pad", "keep"])
def test_inference_uses_the_aspect_of_training(model: Path, wanted: ImageAspect) -> None:
    inputs = inputs_of(model, wanted)
    batch, _ = trained_on(inputs)
    processor = load_processor(inputs.model, where="model")
    save_processor(processor, image_aspect=inputs.image_aspect, into=model)
    assert same(batch, asked(load_vlm(str(model))))
    assert inputs_of(model, "auto").image_aspect == wanted
