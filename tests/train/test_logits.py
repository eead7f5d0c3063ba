"""Memory of a large vocabulary: logits are computed in tiles, as the estimate assumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig

from tests.train.comparing import compute_uncached
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.train import memory
from tita.train.collators import PairCollator
from tita.train.trainer import PairTrainer
from tita.train.training_data import make_dataset

MODEL = str(demo_model_path("reward"))
VOCABULARY, WORDS = 100_000, 100


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor created, backward passes included."""

    size_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self.size_bytes = max(self.size_bytes, tensor.untyped_storage().nbytes())
        return made


def test_logits_are_never_materialised_as_a_whole(data: Any, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(MODEL)
    config = AutoConfig.from_pretrained(MODEL)
    config.text_config.vocab_size = VOCABULARY
    first = next(iter(read_pairs(data.pairs)))
    chosen, rejected = (" ".join([word] * WORDS) for word in ("yes", "no"))
    pairs = [replace(first, chosen=chosen, rejected=rejected)] * 2
    trainer = PairTrainer(
        recall=compute_uncached,
        model=AutoModelForImageTextToText.from_config(config),
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            max_length=None,
            bf16=False,
            use_cpu=True,
            optim="sgd",
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            precompute_ref_log_probs=True,
        ),
        train_dataset=make_dataset(
            pairs, images=data.images, processor=processor, image_aspect="pad"
        ),
        data_collator=PairCollator(processor),
        processing_class=processor,
    )
    with Largest() as largest:
        trainer.train()
    rows = trainer.train_dataset
    ids = PairCollator(processor)([rows[i] for i in range(2)])["input_ids"]
    # The last token has no prediction.
    number = ids.shape[0] * (ids.shape[1] - 1)
    most_tokens, most_words = memory._TILE
    assert number < most_tokens
    assert largest.size_bytes == 4 * number * most_words
    assert largest.size_bytes < 4 * number * VOCABULARY / 3
