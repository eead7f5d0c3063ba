"""What answers are held to: scenes with their questions, and models run without any cache."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from tita.align import Request, Sampling
from tita.align.guidance import log_softmax
from tita.demo.scenes import make_scenes
from tita.vlm import VLM, prepare


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
    said = torch.tensor([tokens], dtype=torch.long)
    # PaliGemma sees its whole prompt at once, in which what is said has no part.
    prompt_sees_ahead = vlm.model.config.model_type == "paligemma"
    of_said = {"attention_mask": 1, "token_type_ids": int(prompt_sees_ahead)}
    whole = {
        name: torch.cat([each, torch.full_like(said, of_said.get(name, 0))], -1)
        if each.shape == inputs["input_ids"].shape
        else each
        for name, each in inputs.items()
    }
    whole["input_ids"] = torch.cat([inputs["input_ids"], said], -1)
    return log_softmax(vlm.model(**whole).logits[:, -1])


@torch.inference_mode()
def greedy(base: VLM, reward: VLM, request: Request) -> list[int]:
    """The likeliest tokens under both models, one forward of each over everything for each."""
    sides = [(vlm, prepare(vlm, [request.prompt])) for vlm in (base, reward)]
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_new_tokens:
        logs = [log_probs(vlm, inputs, tokens) for vlm, inputs in sides]
        tokens.append(int((logs[0] + request.weight * (logs[1] - logs[0])).argmax()))
    return tokens
