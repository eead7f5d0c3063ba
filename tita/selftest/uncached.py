"""Answers and log-probabilities computed the plain way, to compare the engine with.

No code of `tita.align` runs here: the processor makes the inputs, and answers are those of
transformers. For log-probabilities there are no caches and no batches: each model runs over prompt
and answer at once, and the formula is applied to its log-probabilities.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tita.align import Request
from tita.vlm.loading import VLM


def plain_inputs(vlm: VLM, requests: Sequence[Request]) -> Any:
    """Model inputs of questions about square images, padded on the left."""
    prompts = [
        vlm.processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": request.question}],
                }
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        for request in requests
    ]
    inputs = vlm.processor(
        text=prompts, images=[list(request.images) for request in requests],
        padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False,
    ).to(vlm.device)  # fmt: skip
    inputs["pixel_values"] = inputs["pixel_values"].to(vlm.model.dtype)
    return inputs


@torch.inference_mode()
def generate(vlm: VLM, requests: Sequence[Request]) -> list[list[int]]:
    """Greedy answers of transformers' `generate` in one batch, without the prompts.

    Args:
        requests: all with the same length of the answer, which ignores the end of text.
    """
    inputs = plain_inputs(vlm, requests)
    number = requests[0].sampling.max_new_tokens
    ids = vlm.model.generate(
        **inputs, do_sample=False, max_new_tokens=number, min_new_tokens=number
    )
    found: list[list[int]] = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return found


@torch.inference_mode()
def answer_log_probs(vlm: VLM, request: Request, *, answer: Sequence[int]) -> Tensor:
    """Log-probabilities[T, V] in float32 on the CPU at the T positions of the answer.

    Args:
        request: a question about a square image, which every image aspect leaves as it is.
        answer: T token ids.
    """
    inputs = plain_inputs(vlm, [request])
    ids = inputs["input_ids"]
    more = ids.new_tensor([list(answer)])
    logits = vlm.model(
        input_ids=torch.cat([ids, more], -1),
        pixel_values=inputs["pixel_values"],
        use_cache=False,
    ).logits[0, ids.shape[1] - 1 : -1]
    return torch.log_softmax(logits.float(), -1).cpu()


def combine(
    base: Tensor,
    reward: Tensor,
    *,
    weight: float,
    form: str,
    reference: Tensor | None = None,
) -> Tensor:
    """Normalised log-probabilities[T, V] of a guidance form (docs/guidance.md) of inputs[T, V]."""
    if form == "tita":
        scores = base + weight * (reward - base)
    elif form == "genarm":
        scores = base + weight * reward
    else:
        assert form == "dpo"
        assert reference is not None
        scores = base + weight * (reward - reference)
    return torch.log_softmax(scores, -1)
