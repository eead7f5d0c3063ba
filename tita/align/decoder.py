"""One model's side of decoding: prefill once, then one token a step, with its own KV cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tita.vlm import VLM, Prompt, prepare

if TYPE_CHECKING:
    from torch import Tensor


class Decoder:
    """A batch of B rows going through one model. Rows are padded on the left."""

    def __init__(self, vlm: VLM, prompts: Sequence[Prompt]) -> None:
        self.vlm = vlm
        self._inputs = prepare(vlm, prompts)
        self._mask: Tensor = self._inputs["attention_mask"]
        self._cache: Any = None

    @property
    def num_prompt_tokens(self) -> list[int]:
        """Tokens of each row's prompt, image tokens included, padding not."""
        counts: list[int] = self._prompt_lengths.tolist()
        return counts

    @property
    def _prompt_lengths(self) -> "Tensor":
        mask: Tensor = self._inputs["attention_mask"]
        return mask.sum(-1)

    def prefill(self) -> "Tensor":
        """Take in the prompts; logits[B, V] of the first token."""
        # Without these a row's padding would count as text before it.
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        output = self.vlm.model(
            **self._inputs, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def step(self, tokens: "Tensor") -> "Tensor":
        """Take in one token a row, tokens[B]; logits[B, V] of the next one."""
        tokens = tokens.to(self._mask.device)
        self._mask = _with_column(self._mask)
        positions = self._mask.sum(-1, keepdim=True) - 1
        output = self.vlm.model(
            input_ids=tokens.unsqueeze(-1),
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: "Tensor") -> None:
        """Go on with some rows only; rows[K] are indices."""
        rows = rows.to(self._mask.device)
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)


def _with_column(mask: "Tensor") -> "Tensor":
    import torch

    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
