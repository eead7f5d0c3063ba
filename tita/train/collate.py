"""Batches for the trainer: every prompt is tokenized and every image prepared once for its pair."""

from collections.abc import Mapping, Sequence
from typing import Any

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns that TRL reads the reference's log-probabilities from."""


class PairCollator:
    """Does what TRL's `DataCollatorForVisionPreference` does, which prepares each image twice.

    Nothing is cut: `tita.train.dataset.check_fits` has refused what is too long.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Model inputs of 2B sequences: the chosen answers of all B pairs, then the rejected."""
        import torch
        from trl.trainer.utils import flush_left

        prompts = self._processor(
            images=[row["pictures"] for row in rows],
            text=[row["prompt"] for row in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            # The chat template has set them.
            add_special_tokens=False,
        )
        answers = self._processor.tokenizer(
            [row["chosen"] for row in rows] + [row["rejected"] for row in rows],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=False,
        )
        batch = {name: torch.cat([tensor, tensor]) for name, tensor in prompts.items()}
        prompt_mask, answer_mask = batch.pop("attention_mask"), answers["attention_mask"]
        ids = torch.cat([batch.pop("input_ids"), answers["input_ids"]], dim=1)
        completion = torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1)
        # Per-token extras of some models, such as Qwen's `mm_token_type_ids`, are 0 in answers.
        extras = {
            name: torch.cat([batch.pop(name), torch.zeros_like(answer_mask)], dim=1)
            for name in ("token_type_ids", "mm_token_type_ids")
            if name in batch
        }
        mask, ids, completion, *rest = flush_left(
            torch.cat([prompt_mask, answer_mask], dim=1), ids, completion, *extras.values()
        )
        batch |= {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
        batch |= dict(zip(extras, rest, strict=True))
        if REFERENCE[0] in rows[0]:
            batch |= {name: torch.tensor([float(row[name]) for row in rows]) for name in REFERENCE}
        return batch
