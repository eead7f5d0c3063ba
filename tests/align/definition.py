"""What answers are held to: scenes with their questions, and models run without any cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from tita.align import Guidance, Request, Sampling
from tita.align.guidance import log_softmax
from tita.align.sampling import gumbel
from tita.demo.scenes import make_scenes
from tita.vlm import VLM, prepare

LENGTH = 6
"""Of answers: one of the demo's has two digits, so that decoding goes on."""


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


def at(requests: Sequence[Request], weight: float) -> list[Request]:
    """The same, with another weight."""
    return [dataclasses.replace(request, guidance=Guidance(weight=weight)) for request in requests]


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


def choice(scores: torch.Tensor, sampling: Sampling, *, position: int) -> int:
    """Temperature, top-k, top-p by sorting, and the noise of the seed."""
    if not sampling.temperature:
        return int(scores.argmax())
    ordered, tokens = (scores / sampling.temperature).sort(descending=True)
    ordered = ordered[: sampling.top_k or None]
    chances = ordered.softmax(-1)
    kept = tokens[: len(ordered)][chances.cumsum(-1) - chances < sampling.top_p]
    noise = gumbel(len(scores), seed=sampling.seed, position=position)
    return int(kept[(scores / sampling.temperature + noise)[kept].argmax()])


@torch.inference_mode()
def by_definition(base: VLM, reward: VLM, request: Request) -> list[int]:
    """The answer itself: no cache, no batch, both models forward over everything each step."""
    sides = [(vlm, prepare(vlm, [request.prompt])) for vlm in (base, reward)]
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_new_tokens:
        logs = [log_probs(vlm, inputs, tokens) for vlm, inputs in sides]
        mixed = logs[0] + request.guidance.weight * (logs[1] - logs[0])
        token = choice(mixed[0], request.sampling, position=len(tokens))
        if token == base.tokenizer.eos_token_id and not request.sampling.ignore_end:
            break
        tokens.append(token)
    return tokens
