"""Batches for the trainers: every prompt is tokenized and every image prepared once."""

from collections.abc import Mapping, Sequence
from typing import Any

from tita.vlm import adds_special_tokens

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns that TRL reads the reference's log-probabilities from."""
IGNORED = -100
"""Label of a token that no loss is taken of; torch's own `ignore_index`."""

Rows = Sequence[Mapping[str, Any]]


class PairCollator:
    """Does what TRL's `DataCollatorForVisionPreference` does, which prepares each image twice.

    Nothing is cut: preflight has looked that everything fits.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs of 2B sequences: the chosen answers of all B pairs, then the rejected."""
        import torch

        answers = [[row[name] for row in rows] for name in ("chosen", "rejected")]
        batch = _encode(rows, answers=answers, processor=self._processor)
        if REFERENCE[0] in rows[0]:
            batch |= {name: torch.tensor([float(row[name]) for row in rows]) for name in REFERENCE}
        return batch


class AnswerCollator:
    """Batches of questions with one answer each, for supervised steps on the answers."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs of B sequences, with `labels[B, L]` that hold the answers alone."""
        answers = [[row["answer"] for row in rows]]
        batch = _encode(rows, answers=answers, processor=self._processor)
        answered = batch.pop("completion_mask")
        batch["labels"] = batch["input_ids"].masked_fill(answered == 0, IGNORED)
        return batch


def _encode(rows: Rows, *, answers: Sequence[Sequence[str]], processor: Any) -> dict[str, Any]:
    """Model inputs of K B sequences, where K lists of B answers share the B prompts of `rows`."""
    import torch
    from trl.trainer.utils import flush_left

    prompts = processor(
        images=[row["pictures"] for row in rows],
        text=[row["prompt"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor, rows[0]["prompt"]),
    )
    ends = processor.tokenizer(
        [answer for some in answers for answer in some],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=False,
    )
    batch = {name: torch.cat([tensor] * len(answers)) for name, tensor in prompts.items()}
    prompt_mask, answer_mask = batch.pop("attention_mask"), ends["attention_mask"]
    ids = torch.cat([batch.pop("input_ids"), ends["input_ids"]], dim=1)
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
    return batch | dict(zip(extras, rest, strict=True))
