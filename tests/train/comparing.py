"""Compares the weights of models, and our collator with TRL's; a reference that is not cached."""

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tita.train.collators import PairCollator
from tita.train.reference import Compute
from tita.vlm.loading import load_vlm


def weights(model: Path) -> dict[str, torch.Tensor]:
    """As `from_pretrained` loads them: the names in files of ZeRO-3 and merged LoRA differ."""
    state: dict[str, torch.Tensor] = load_vlm(str(model), dtype="float32").model.state_dict()
    return state


def largest_difference(one: Path, other: Path) -> float:
    """Of all weights that change what a model computes.

    A bias of keys adds the same number to all scores of a query, which softmax ignores. Its
    gradient is rounding errors, which Adam scales to whole steps.
    """
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    names = [name for name in left if not name.endswith("k_proj.bias")]
    return max(float((left[name] - right[name]).abs().max()) for name in names)


def compute_uncached(compute: Compute, _: bool) -> list[list[float]]:
    """For `PairTrainer(recall=...)`: the whole reference pass, read from no store."""
    parts: list[list[float]] = []

    def add(batch: Sequence[Sequence[float]]) -> None:
        parts.extend([] for _ in range(len(batch) - len(parts)))
        for part, values in zip(parts, batch, strict=True):
            part += values

    compute(0, add)
    return parts


def assert_batches_of_trl(rows: Any, *, number: int, processor: Any) -> None:
    """Assert that both collators make equal batches of the first `number` rows."""
    some = [rows[i] for i in range(number)]
    ours = PairCollator(processor)(some)
    theirs = DataCollatorForVisionPreference(processor)(
        [{**row, "images": row["pictures"]} for row in some]
    )
    assert ours.keys() == theirs.keys()
    # TRL's masks end-of-text as padding if the padding token has id 0; both are masked here.
    for batch in (ours, theirs):
        batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    # Ernie's. TRL leaves inputs per token that it does not know as long as the prompt.
    theirs.pop("moe_mm_token_type_ids", None)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


class Counted:
    """Counts the rows of `pixel_values` that a model encodes: images or patches."""

    number = 0

    def __init__(self, model: Any) -> None:
        encode = model.model.get_image_features

        names = tuple(inspect.signature(encode).parameters)

        @functools.wraps(encode)
        def count(*given: Any, **named: Any) -> Any:
            self.number += len((dict(zip(names, given, strict=False)) | named)["pixel_values"])
            return encode(*given, **named)

        model.model.get_image_features = count
