"""Guided log-probabilities computed the plain way, to compare the engine with.

No cache, no batch, no code of `tita.align`: the processor makes the inputs, each model runs over
prompt and answer at once, and the formula is applied to the log-probabilities.
"""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from tita.vlm.loading import VLM


@torch.inference_mode()
def answer_log_probs(
    vlm: VLM, *, question: str, image: PIL.Image.Image, answer: Sequence[int]
) -> Tensor:
    """Log-probabilities[T, V] in float32 on the CPU at the T positions of the answer.

    Args:
        question: text after the image.
        image: a square image, which every image aspect leaves as it is.
        answer: T token ids.
    """
    content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = vlm.processor(
        text=[prompt], images=[image], return_tensors="pt", add_special_tokens=False
    ).to(vlm.device)
    ids = inputs["input_ids"]
    more = ids.new_tensor([list(answer)])
    logits = vlm.model(
        input_ids=torch.cat([ids, more], -1),
        pixel_values=inputs["pixel_values"].to(vlm.model.dtype),
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
