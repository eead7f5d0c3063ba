"""A batch with more sequences per pair than TRL's two, which TRL sees as a batch of pairs."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from tita.train.collators import IGNORED, OTHER_REFERENCE, REFERENCE
from tita.train.shared_images import SharedImages

_PER_TOKEN_INPUTS = (
    "input_ids",
    "attention_mask",
    "completion_mask",
    "token_type_ids",
    "mm_token_type_ids",
)
_PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL reads from its fused head."""
_LAYOUT = ("image_first", "image_tokens")


class PartedBatch:
    """K parts of B sequences: all chosen answers, all rejected ones, and the same under others.

    One forward pass computes all parts. TRL, which knows two, gets them from `forward` as if they
    were the whole batch.
    """

    def __init__(self, inputs: Mapping[str, Any], *, shared_images: SharedImages | None) -> None:
        """Read a batch of `PairCollator`, and describe its images to the vision tower."""
        self._rows = {name: inputs[name] for name in _PER_TOKEN_INPUTS if name in inputs}
        self._others = {
            name: value
            for name, value in inputs.items()
            if name not in (*_PER_TOKEN_INPUTS, *_LAYOUT, *REFERENCE, *OTHER_REFERENCE)
        }
        self._references = {name: inputs[name] for name in REFERENCE if name in inputs}
        self._outputs: Any = None
        self.num_parts = len(inputs["image_first"]) if "image_first" in inputs else 2
        self._size = len(self._rows["input_ids"]) // self.num_parts
        if shared_images is None:
            return
        if "image_first" in inputs:
            first, tokens = (inputs[name].flatten().tolist() for name in _LAYOUT)
            shared_images.describe(first=first, tokens=tokens)
        else:
            shared_images.assume_pairs()

    def pairs(self, number: int = 0) -> dict[str, Any]:
        """TRL's inputs for the first two parts, or with `number` 1 for the third and fourth."""
        part = self._slice(2 * number, 2 * number + 2)
        rows = {name: value[part] for name, value in self._rows.items()}
        return self._others | self._references | rows

    def forward(self, model: Any, number: int = 0) -> Callable[..., Any]:
        """A stand-in for `model`, which computes all parts at once and returns those of `pairs`."""

        def run(**options: Any) -> SimpleNamespace:
            if self._outputs is None:
                mask = self._rows["completion_mask"]
                rows = {n: value for n, value in self._rows.items() if n != "completion_mask"}
                rows["labels"] = rows["input_ids"].masked_fill(mask == 0, IGNORED)
                self._outputs = model(**(options | rows))
            part = self._slice(2 * number, 2 * number + 2)
            found = {name: getattr(self._outputs, name) for name in _PER_TOKEN_OUTPUTS}
            return SimpleNamespace(
                aux_loss=self._outputs.aux_loss,
                **{name: None if x is None else x[part] for name, x in found.items()},
            )

        return run

    def log_probs(self, part: int) -> torch.Tensor:
        """Log-probabilities `[B]` of a part's answers, after the forward pass."""
        found: torch.Tensor = self._outputs.log_probs[self._slice(part, part + 1)]
        return found.sum(dim=1)

    def _slice(self, first: int, end: int) -> slice:
        return slice(first * self._size, end * self._size)
