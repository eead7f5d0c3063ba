"""Other families than LLaVA-1.5: batches are TRL's own, and a DPO step goes through."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.families import FAMILIES, built
from tita.data import read_pairs
from tita.train.collate import PairCollator
from tita.train.dataset import make_dataset
from tita.train.trainer import PairTrainer, encode_images_once


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, data: Any) -> tuple[Any, Any, Any]:
    """Model, processor, and the rows of its dataset."""
    model, processor = built(request.param)
    pairs = list(read_pairs(data.pairs))[:4]
    rows = make_dataset(pairs, images=data.images, processor=processor, image_aspect="keep")
    return model, processor, rows


def test_batches_are_those_of_trl(family: tuple[Any, Any, Any]) -> None:
    _, processor, rows = family
    some = [rows[i] for i in range(3)]
    ours = PairCollator(processor)(some)
    theirs = DataCollatorForVisionPreference(processor)(
        [{**row, "images": row["pictures"]} for row in some]
    )
    assert ours.keys() == theirs.keys()
    for batch in (ours, theirs):
        batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


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
