"""The recipe as arguments of TRL and DeepSpeed: the paper's settings, with no overrides."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor
from trl import DPOConfig, SFTConfig

from tests.train.comparing import compute_uncached
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.dpo_losses import LOSSES
from tita.errors import TitaError
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe, validate_recipe
from tita.train.collators import PairCollator
from tita.train.model import load_model
from tita.train.run import CHECKPOINTING, dpo_options, sft_options
from tita.train.trainer import PairTrainer
from tita.train.training_data import make_dataset
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
    assert getattr(config, CHECKPOINTING)
    assert config.max_length is None, "TRL would truncate"
    assert (recipe_of().max_length, recipe_of().image_aspect) == (2048, "auto")


def test_the_warm_up_has_its_own_rate_and_steps(tmp_path: Path) -> None:
    recipe = recipe_of(sft={"steps": 7}, learning_rate=1e-6)
    options = sft_options(recipe, folder=tmp_path, on_gpu=False)
    config = SFTConfig(**options | {"deepspeed": None})
    assert (config.max_steps, config.learning_rate) == (7, 2e-5)


def train_one_step(data: Any, folder: Path, **changes: Any) -> float:
    """The loss of the first step of four pairs, when the policy equals its reference."""
    loss: float = make_trainer(data, folder, max_steps=1, **changes).train().training_loss
    return loss


def make_trainer(data: Any, folder: Path, **changes: Any) -> PairTrainer:
    """A trainer whose steps see the same four pairs."""
    recipe = recipe_of(dtype="float32", batch_size=4, logging_steps=1, **changes)
    options = dpo_options(recipe, folder=folder, on_gpu=False) | {"deepspeed": None}
    processor = AutoProcessor.from_pretrained(MODEL)
    pairs = list(read_pairs(data.pairs))[:4]
    return PairTrainer(
        recall=compute_uncached,
        model=load_model(recipe, start=MODEL),
        args=DPOConfig(**options | {"save_strategy": "no"}),
        train_dataset=make_dataset(
            pairs, images=data.images, processor=processor, image_aspect="pad"
        ),
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


def test_a_loss_that_is_not_finite_is_logged(data: Any, tmp_path: Path) -> None:
    """transformers replaces it, by default, with the mean of the losses before, or with 0."""
    options = {"learning_rate": 1e30, "schedule": "constant", "warmup_ratio": 0.0}
    trainer = make_trainer(data, tmp_path, max_steps=3, **options)
    trainer.train()
    first, *others = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert len(others) == 2
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert not any(map(math.isfinite, others)), others


def mean_nll(data: Any) -> float:
    """Mean negative log-likelihood of the tokens of the chosen answers, from the logits."""
    processor = AutoProcessor.from_pretrained(MODEL)
    pairs = list(read_pairs(data.pairs))[:4]
    rows = make_dataset(pairs, images=data.images, processor=processor, image_aspect="pad")
    batch = PairCollator(processor)([rows[i] for i in range(4)])
    chosen = {name: batch[name][:4] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = load_vlm(MODEL, dtype="float32").model(**chosen).logits[:, :-1]
    answered = batch["completion_mask"][:4, 1:].bool()
    labels = chosen["input_ids"][:, 1:][answered]
    return float(torch.nn.functional.cross_entropy(logits[answered], labels))


def test_the_nll_of_the_chosen_answers_is_added(data: Any, tmp_path: Path) -> None:
    expected = math.log(2) + 0.5 * mean_nll(data)
    for changes in ({"nll_weight": 0.5}, {"loss": ["sigmoid", {"sft": 0.5}]}):
        loss = train_one_step(data, tmp_path, **changes)
        assert loss == pytest.approx(expected, abs=1e-4)


def test_mpo_is_the_sum_of_three_losses(data: Any, tmp_path: Path) -> None:
    expected = 0.8 * math.log(2) + 0.2 * 2 * math.log(2) + mean_nll(data)
    assert train_one_step(data, tmp_path, loss="mpo") == pytest.approx(expected, abs=1e-4)


AT_THE_START = {
    "hinge": 1.0,
    "ipo": 25.0,  # (1 / 2 beta)^2
    "exo_pair": math.log(0.5) - 0.5 * (math.log(0.9) + math.log(0.1)),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
}
"""What each loss is while the policy equals its reference; others are ln 2."""


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sft"}))
def test_every_loss_of_trl_goes_with_cached_references(
    data: Any, tmp_path: Path, name: str
) -> None:
    smoothing = 0.1 if name in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    loss = train_one_step(data, tmp_path, loss=name, label_smoothing=smoothing)
    assert loss == pytest.approx(AT_THE_START.get(name, math.log(2)), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"ld_alpha": 0.3},
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js_divergence"},
        {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ],
    ids=str,
)
def test_the_cached_reference_is_of_the_same_form(
    data: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    loss = train_one_step(data, tmp_path, **changes)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "dpo"}, "unknown 'dpo'; choose from sigmoid, hinge"),
        ({"loss": ["sigmoid", "sigmoid"]}, "'sigmoid' twice"),
        ({"loss": ["mpo", "ipo"]}, "'mpo' is a preset; --set loss=mpo"),
        ({"loss": {"sigmoid": 0}}, "no loss has a weight above 0"),
        ({"loss": "mpo", "nll_weight": 1}, "`nll_weight` and `sft` in `loss` are the same"),
        ({"label_smoothing": 0.1}, "`label_smoothing` has no effect on sigmoid"),
        ({"loss": "exo_pair"}, "--set label_smoothing=0.001"),
        ({"loss": "aot", "f_divergence": "forward_kl"}, "aot is not defined for f_divergence"),
        ({"f_alpha_divergence_coef": 0.5}, "no effect on f_divergence=reverse_kl"),
        ({"image_preference": {}, "ld_alpha": 0.5}, "not defined with `ld_alpha`"),
        ({"image_preference": {}, "f_divergence": "forward_kl"}, "with `f_divergence`"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TitaError, match=re.escape(message)):
        recipe_of(**changes)
