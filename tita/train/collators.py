"""Collates formatted rows into batches: tokens, images, answers and reference log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import flush_left

from tita.train.shared_images import take_inputs
from tita.vlm.prompts import adds_special_tokens, completion_ids

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns from which TRL reads the reference model's log-probabilities."""
OTHER_REFERENCE = ("ref_other_chosen_logps", "ref_other_rejected_logps")
"""Columns of the same answers' log-probabilities under the pair's other image."""
IGNORED = -100
"""Label of tokens without a loss; torch's `ignore_index`."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Batches of pairs. Each prompt is tokenized and each image processed once.

    TRL's `DataCollatorForVisionPreference` makes the same batches but processes each image twice.
    Nothing is truncated: preflight checks that every pair fits.
    """

    processor: Any
    image_token: int | None = None
    """Id of the model's image token, for batches with negative images."""

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs `[K B, L]`: the chosen answers of all B pairs, then the rejected ones.

        Rows with `other_pictures` add the chosen answers under these images, K = 3; rows that are
        `held_out` add the rejected ones too, K = 4. Both add
        `image_first[K, B]` and `image_tokens[K, B]` for `SharedImages`.
        """
        if "other_pictures" in rows[0]:
            batch = self._encode_with_others(rows)
        else:
            answers = [[row[name] for row in rows] for name in ("chosen", "rejected")]
            batch = _encode(rows, answers=answers, processor=self.processor)
        for name in (*REFERENCE, *OTHER_REFERENCE):
            if name in rows[0]:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        return batch

    def _encode_with_others(self, rows: Rows) -> dict[str, Any]:
        number = len(rows)
        prompts = _process(
            [*rows, *rows],
            images=[row[name] for name in ("pictures", "other_pictures") for row in rows],
            processor=self.processor,
        )
        own, other = range(number), range(number, 2 * number)
        parts = [("chosen", own), ("rejected", own), ("chosen", other)]
        if rows[0]["held_out"]:
            parts.append(("rejected", other))
        order = [index for _, some in parts for index in some]
        tokens = prompts["input_ids"].eq(self.image_token or 0).sum(1).tolist()
        batch = _add_answers(
            take_inputs(prompts, order, tokens=tokens),
            answers=[[row[name] for row in rows] for name, _ in parts],
            prompts=[row["prompt"] for row in rows],
            processor=self.processor,
        )
        names = [row["picture_names"][which] for which in (0, 1) for row in rows]
        shown = [names[index] for index in order]
        layout = len(parts), number
        batch["image_first"] = torch.tensor([shown.index(name) for name in shown]).view(layout)
        batch["image_tokens"] = torch.tensor([tokens[index] for index in order]).view(layout)
        return batch


@dataclass(frozen=True, slots=True)
class AnswerCollator:
    """Batches of questions with one answer each, for supervised training on the answers."""

    processor: Any

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs `[B, L]` and `labels[B, L]` that contain the answers alone."""
        answers = [[row["answer"] for row in rows]]
        batch = _encode(rows, answers=answers, processor=self.processor)
        completion_mask = batch.pop("completion_mask")
        batch["labels"] = batch["input_ids"].masked_fill(completion_mask == 0, IGNORED)
        return batch


def _encode(rows: Rows, *, answers: Sequence[Sequence[str]], processor: Any) -> dict[str, Any]:
    """Model inputs `[K B, L]`, where K lists of B answers share the B prompts of `rows`."""
    prompts = _process(rows, images=[row["pictures"] for row in rows], processor=processor)
    return _add_answers(
        {name: torch.cat([tensor] * len(answers)) for name, tensor in prompts.items()},
        answers=answers,
        prompts=[row["prompt"] for row in rows],
        processor=processor,
    )


def _process(rows: Rows, *, images: Sequence[Any], processor: Any) -> Mapping[str, torch.Tensor]:
    """The processor's output for the prompts of `rows`, padded on the left."""
    found: Mapping[str, torch.Tensor] = processor(
        images=images,
        text=[row["prompt"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor, rows[0]["prompt"]),
    )
    return found


def _add_answers(
    batch: dict[str, torch.Tensor],
    *,
    answers: Sequence[Sequence[str]],
    prompts: Sequence[str],
    processor: Any,
) -> dict[str, Any]:
    """Prompts `[K B, L]` with K lists of answers to B prompts behind them, without gaps."""
    ids_of_answers = [
        completion_ids(processor, prompt, answer)
        for some in answers
        for prompt, answer in zip(prompts, some, strict=True)
    ]
    completions = processor.tokenizer.pad(
        {"input_ids": ids_of_answers}, padding_side="right", return_tensors="pt"
    )
    prompt_mask, answer_mask = batch.pop("attention_mask"), completions["attention_mask"]
    ids = torch.cat([batch.pop("input_ids"), completions["input_ids"]], dim=1)
    completion_mask = torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1)
    # Per-token inputs of some models, such as Qwen's `mm_token_type_ids`, are 0 in answers.
    per_token = [name for name, tensor in batch.items() if tensor.shape == prompt_mask.shape]
    extras = {
        name: torch.cat([batch.pop(name), torch.zeros_like(answer_mask)], dim=1)
        for name in per_token
    }
    mask, ids, completion_mask, *rest = flush_left(
        torch.cat([prompt_mask, answer_mask], dim=1), ids, completion_mask, *extras.values()
    )
    batch |= {"input_ids": ids, "attention_mask": mask, "completion_mask": completion_mask}
    return batch | dict(zip(extras, rest, strict=True))
