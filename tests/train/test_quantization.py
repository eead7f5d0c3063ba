"""4-bit weights: what is packed, what trains, what is saved, and where they are refused."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoProcessor
from trl import DPOConfig

from tests.families import FAMILIES
from tests.train.comparing import weights
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.recipes import LoraRecipe, TrainRecipe, validate_recipe
from tita.train.collators import PairCollator
from tita.train.memory import WorldSize, cheaper_recipes, estimate_memory, model_shape
from tita.train.model import (
    load_model,
    lora_config,
    meta_model,
    save_model,
    save_processor,
    unquantized_modules,
)
from tita.train.preflight import check_memory, check_quantization
from tita.train.shared_images import encode_images_once
from tita.train.trainer import PairTrainer
from tita.train.training_data import make_dataset

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs the extra `quantization`: pip install -c constraints.txt bitsandbytes",
)
MODEL = str(demo_model_path("reward"))
LORA = {"rank": 4, "alpha": 64, "dropout": 0.0}


def recipe_of(**changes: Any) -> TrainRecipe:
    own = {"model": MODEL, "pairs": "p", "quantization": "4bit", "lora": LORA}
    return validate_recipe(TrainRecipe, own | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, "trains adapters only; --set lora.rank=64"),
        ({"deepspeed": "zero3"}, "does not go with deepspeed=zero3; --set deepspeed=zero2"),
        ({"deepspeed": "zero3_offload"}, "does not go with deepspeed=zero3_offload"),
        ({"dtype": "float16"}, "does not go with dtype=float16; --set dtype=bfloat16"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TitaError, match=message):
        recipe_of(**changes)


def test_without_cuda_it_is_refused() -> None:
    with pytest.raises(TitaError, match="needs a GPU with CUDA, and there is none"):
        check_quantization(recipe_of(), capability=None)
    # With a GPU the package must be there, which the image for GPUs has.
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(TitaError, match="needs bitsandbytes, which is not installed"):
            check_quantization(recipe_of(), capability=(8, 0))
    check_quantization(recipe_of(quantization=None), capability=None)


@needs_bitsandbytes
def test_only_layers_of_the_language_model_are_packed() -> None:
    model = load_model(recipe_of(), start=MODEL)
    packed = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {name for name in linear if name.startswith("model.language_model.")}
    assert packed == inside
    assert linear - packed
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    estimated = model_shape(meta_model(recipe_of(), start=MODEL)).num_quantizable
    assert estimated == sum(
        m.in_features * m.out_features for n, m in model.named_modules() if n in packed
    )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_language_model_is_found_in_every_family(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = FAMILIES[name](Path(folder))
        config.save_pretrained(folder)
        kept = unquantized_modules(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    packed = [n for n in linear if not any(n == k or n.startswith(f"{k}.") for k in kept)]
    assert packed
    assert not [n for n in packed if "vis" in n or "project" in n or "connector" in n]
    assert len(packed) < len(linear)


@needs_bitsandbytes
def test_a_quantized_model_trains_and_its_merged_weights_are_whole(
    data: Any, tmp_path: Path, lone_rank: None
) -> None:
    """On the CPU, where bitsandbytes has slow kernels: the run itself refuses it there."""
    recipe, processor = recipe_of(), AutoProcessor.from_pretrained(MODEL)
    model = load_model(recipe, start=MODEL)
    pairs = list(read_pairs(data.pairs))[:4]
    trainer = PairTrainer(
        # Not computed: an evaluation would repack the weights for inference on CPUs.
        recall=lambda *_: ([-3.0] * 4, [-3.0] * 4),
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4,
            learning_rate=3e-3, max_length=None, bf16=True, use_cpu=True, report_to="none",
            save_strategy="no", remove_unused_columns=False, precompute_ref_log_probs=True,
            logging_steps=1,
        ),
        train_dataset=make_dataset(
            pairs, images=data.images, processor=processor, image_aspect="pad"
        ),
        data_collator=PairCollator(processor, model.config.image_token_id),
        processing_class=processor,
        peft_config=lora_config(recipe),
        shared_images=encode_images_once(model),
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.02
    save_model(trainer, start=MODEL, into=tmp_path / "model", name="m")
    save_processor(processor, image_aspect="pad", into=tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert "quantization_config" not in config
    trained, start = weights(tmp_path / "model"), weights(Path(MODEL))
    assert trained.keys() == start.keys()
    changed = {
        name for name in start if not torch.equal(trained[name].bfloat16(), start[name].bfloat16())
    }
    assert changed
    assert not any("vision_tower" in name for name in changed)


def test_memory_counts_packed_weights_and_recommends_them() -> None:
    shape = model_shape(meta_model(recipe_of(), start=MODEL))
    one = WorldSize(total=1, local=1)
    packed, whole = (
        estimate_memory(recipe_of(quantization=how), shape=shape, world=one, tokens=50)
        for how in ("4bit", None)
    )
    saved = shape.num_quantizable * (2 - 4.127 / 8) - 2 * shape.largest_layer
    assert whole.weights - packed.weights == pytest.approx(saved, abs=1)
    # The final model is whole.
    assert packed.scratch == whole.scratch
    full = TrainRecipe(model=MODEL, pairs="p", dtype="bfloat16")
    change, other = next(
        (change, other) for change, other in cheaper_recipes(full) if other.quantization
    )
    assert "--set quantization=4bit" in change
    assert "--set lora.rank=64" in change
    validate_recipe(TrainRecipe, other.model_dump())
    assert other.lora == LoraRecipe()
    with pytest.raises(TitaError) as refused:
        # Nothing fits: on the CPU 4 bits are not among the remedies either.
        check_memory(full, start=MODEL, world=one, tokens=50, free=1, on_gpu=False)
    assert "quantization" not in str(refused.value)
