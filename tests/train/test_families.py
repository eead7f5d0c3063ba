"""Model families other than LLaVA-1.5: batches equal TRL's, and a DPO step succeeds."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl import DPOConfig

from tests.families import LAYERED, TRAINED, built, deepseek_vl_hybrid, mllama, qwen3_5, saved
from tests.train.comparing import Counted, assert_batches_of_trl, compute_uncached
from tita.data import read_pairs
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.train.collators import PairCollator
from tita.train.model import load_model
from tita.train.preflight import check_processor
from tita.train.shared_images import encode_images_once
from tita.train.trainer import PairTrainer
from tita.train.training_data import TrainInputs, make_dataset, prompt_token_ids
from tita.vlm.processors import load_processor
from tita.vlm.prompts import Prompt, prompt_text


@pytest.fixture(params=TRAINED)
def family(request: pytest.FixtureRequest, data: Any, tmp_path: Path) -> tuple[Any, Any, Any]:
    """Model, processor and dataset rows, with images of different sizes."""
    model, processor = built(request.param)
    pairs = []
    for number, pair in enumerate(itertools.islice(read_pairs(data.pairs), 4)):
        image = Image.open(data.images / pair.image).resize((40 + 50 * number, 80))
        image.save(tmp_path / f"{number}.png")
        pairs.append(replace(pair, image=f"{number}.png"))
    rows = make_dataset(pairs, images=tmp_path, processor=processor, image_aspect="keep")
    return model, processor, rows


LINE = Image.new("RGB", (900, 3))
NOTHING = TrainInputs(
    model="",
    model_name="",
    image_aspect="keep",
    pairs=(),
    pairs_path=Path(),
    answers=(),
    images=Path(),
)


def test_batches_equal_trls(family: tuple[Any, Any, Any]) -> None:
    _, processor, rows = family
    assert_batches_of_trl(rows, number=3, processor=processor)


def test_a_processor_that_makes_labels_is_an_error() -> None:
    _, processor = built("paligemma")
    with pytest.raises(TitaError, match="its processor makes labels"):
        check_processor(processor, inputs=NOTHING, where="p")


@pytest.mark.parametrize("family", [mllama, qwen3_5])
def test_a_model_that_no_engine_runs_is_an_error(family: Any, tmp_path: Path) -> None:
    """Before it is trained: the result would be of no use."""
    folder = str(saved(family, tmp_path))
    inputs = replace(NOTHING, model=folder)
    with pytest.raises(TitaError, match=r"^r: keeps (images apart|more between tokens)"):
        check_processor(load_processor(folder, where="r"), inputs=inputs, where="r")


def test_a_model_without_an_image_token_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "git"}')
    _, processor = built("qwen2_vl")
    with pytest.raises(
        TitaError, match=r"^r: does not say which token stands for an image \(git\)"
    ):
        check_processor(processor, inputs=replace(NOTHING, model=str(tmp_path)), where="r")


def test_both_towers_of_a_model_are_frozen(tmp_path: Path) -> None:
    model = load_model(
        TrainRecipe(model="m", pairs="p", dtype="float32"),
        start=str(saved(deepseek_vl_hybrid, tmp_path)),
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any("vision_model." in name for name in trained)
    assert trained


def test_an_image_that_a_processor_rejects_is_an_error() -> None:
    """Image files this narrow are rejected before they get to a processor."""
    _, processor = built("qwen2_vl")
    prompt = prompt_text(processor, Prompt(text="What is it?", images=(LINE,)))
    with pytest.raises(
        TitaError,
        match=r"an image of 900 x 3: rejected by the model's processor \(.*aspect ratio",
    ):
        prompt_token_ids({"prompt": prompt, "pictures": [LINE]}, processor=processor)


def test_a_training_step_succeeds(family: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, processor, rows = family
    batch = PairCollator(processor)([rows[i] for i in range(3)])
    del batch["completion_mask"]
    with torch.no_grad():
        twice = model(**batch).logits
        counted = Counted(model)
        shared = encode_images_once(model) is not None
        once = model(**batch).logits
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)
    assert shared == (model.config.model_type not in LAYERED)
    assert counted.number * (1 + shared) == len(batch["pixel_values"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = PairTrainer(
        recall=compute_uncached,
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            precompute_ref_log_probs=True,
        ),
        train_dataset=rows,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )
    # Before the first step, model and reference are equal.
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-5)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("vis" in name for name in moved), "the vision tower got no gradients"
