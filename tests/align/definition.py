"""What answers are held to: scenes with their questions, and models run without any cache."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from tita.align import Request, Sampling
from tita.align.guidance import log_softmax
from tita.demo.scenes import make_scenes
from tita.vlm import VLM


def asked(number: int, *, sampling: Sampling, **how: Any) -> list[Request]:
    """The questions of so many scenes, of unequal lengths; `how` goes into each request."""
    return [
        Request(
            question=question.text,
            images=(PIL.Image.fromarray((scene.pixels * 255).round().astype("uint8")),),
            sampling=sampling,
            **how,
        )
        for scene in make_scenes("validation", number=number)
        for question in scene.questions
    ]


def log_probs(vlm: VLM, inputs: dict[str, Any], tokens: Sequence[int]) -> torch.Tensor:
    """log p[1, V] after a prompt and `tokens`: one forward over everything, no cache, no batch."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], -1)
    output = vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"])
    return log_softmax(output.logits[:, -1])
