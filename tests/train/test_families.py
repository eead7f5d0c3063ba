"""Other families than LLaVA-1.5: batches are TRL's own, and a DPO step goes through."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl import DPOConfig

from tests.families import FAMILIES, built
from tests.train.comparing import assert_batches_of_trl
from tita.data import read_pairs
from tita.errors import TitaError
from tita.records import Pair
from tita.train.collate import PairCollator
from tita.train.dataset import lengths, make_dataset
from tita.train.inputs import Inputs
from tita.train.preflight import check_vocabulary
from tita.train.trainer import PairTrainer, encode_images_once


@pytest.fixture(params=sorted(FAMILIES.keys() - {"paligemma"}))
def family(request: pytest.FixtureRequest, data: Any) -> tuple[Any, Any, Any]:
    """Model, processor, and the rows of its dataset."""
    model, processor = built(request.param)
    pairs = list(read_pairs(data.pairs))[:4]
    rows = make_dataset(pairs, images=data.images, processor=processor, image_aspect="keep")
    return model, processor, rows


def test_batches_are_those_of_trl(family: tuple[Any, Any, Any]) -> None:
    _, processor, rows = family
    assert_batches_of_trl(rows, number=3, processor=processor)


def test_a_processor_that_makes_labels_is_refused() -> None:
    _, processor = built("paligemma")
    nothing = Inputs(
        model="", model_name="", pairs=(), pairs_path=Path(), answers=(), images=Path()
    )
    with pytest.raises(TitaError, match="its processor makes labels of its own"):
        check_vocabulary(processor, inputs=nothing, where="p")


def test_an_image_that_a_processor_refuses_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (900, 3)).save(tmp_path / "line.png")
    pair = Pair(id="1", image="line.png", question="What is it?", chosen="a", rejected="b")
    _, processor = built("qwen2_vl")
    rows = make_dataset([pair], images=tmp_path, processor=processor, image_aspect="keep")
    with pytest.raises(TitaError, match=r"an image of 900 x 3: .* refuses it \(.*aspect ratio"):
        list(lengths(rows, processor=processor))


def test_a_step_goes_through(family: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, processor, rows = family
    assert not encode_images_once(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = PairTrainer(
        recall=lambda compute: compute(),
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
    # Before the first step model and reference are one.
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-5)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("vis" in name for name in moved), "nothing came back to the image"
