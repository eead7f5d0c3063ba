"""The recipe as arguments of TRL and DeepSpeed: the paper's settings, with no overrides."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor
from trl import DPOConfig, SFTConfig

from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe, validate_recipe
from tita.train.model import load_model
from tita.train.run import dpo_options, sft_options
from tita.train.trainer import PairTrainer
from tita.train.training_data import PairCollator, make_dataset
from tita.vlm.loading import load_vlm

MODEL = str(demo_model_path("reward"))


def recipe_of(**changes: Any) -> TrainRecipe:
    return validate_recipe(TrainRecipe, {"model": MODEL, "pairs": "p", "images": "i"} | changes)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_files_do_not_override_the_recipe(name: str, stage: int) -> None:
    config = deepspeed_config(name)
    # A scheduler or optimizer here would silently replace the recipe's.
    assert not {"scheduler", "optimizer"} & config.keys()
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["bf16"] == {"enabled": "auto"}
    assert config["zero_optimization"]["stage"] == stage
    whole = config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
    assert whole is (True if stage == 3 else None)
    options = dpo_options(recipe_of(deepspeed=name), folder=Path("x"), on_gpu=True)
    assert options["deepspeed"] == config


def test_defaults_are_the_papers_settings(tmp_path: Path) -> None:
    options = dpo_options(recipe_of(), folder=tmp_path, on_gpu=False)
    config = DPOConfig(**options | {"deepspeed": None})
    assert (config.beta, config.learning_rate, config.num_train_epochs) == (0.1, 2e-6, 1)
    assert (config.lr_scheduler_type, config.per_device_train_batch_size) == ("cosine", 8)
    assert config.bf16
    assert config.activation_checkpointing
    assert config.max_length is None, "TRL would truncate"
    assert (recipe_of().max_length, recipe_of().image_aspect) == (2048, "auto")


def test_the_warm_up_has_its_own_rate_and_steps(tmp_path: Path) -> None:
    recipe = recipe_of(sft={"steps": 7}, learning_rate=1e-6)
    options = sft_options(recipe, folder=tmp_path, on_gpu=False)
    config = SFTConfig(**options | {"deepspeed": None})
    assert (config.max_steps, config.learning_rate) == (7, 2e-5)


def test_the_nll_of_the_chosen_answers_is_added(data: Any, tmp_path: Path) -> None:
    recipe = recipe_of(nll_weight=0.5, dtype="float32", max_steps=1, batch_size=4, logging_steps=1)
    options = dpo_options(recipe, folder=tmp_path, on_gpu=False) | {"deepspeed": None}
    processor = AutoProcessor.from_pretrained(MODEL)
    pairs = list(read_pairs(data.pairs))[:4]
    rows = make_dataset(pairs, images=data.images, processor=processor, image_aspect="pad")
    trainer = PairTrainer(
        recall=lambda compute: compute(),
        model=load_model(recipe, start=MODEL),
        args=DPOConfig(**options | {"save_strategy": "no"}),
        train_dataset=rows,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )
    loss = trainer.train().training_loss
    batch = PairCollator(processor)([rows[i] for i in range(4)])
    chosen = {name: batch[name][:4] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = load_vlm(MODEL, dtype="float32").model(**chosen).logits[:, :-1]
    answered = batch["completion_mask"][:4, 1:].bool()
    nll = torch.nn.functional.cross_entropy(logits[answered], chosen["input_ids"][:, 1:][answered])
    assert loss == pytest.approx(math.log(2) + 0.5 * float(nll), abs=1e-4)
