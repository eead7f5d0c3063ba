"""Reference results: greedy and sampled answers computed without caches or batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from tita.align import Guidance, Request, Sampling
from tita.align.guidance import log_softmax
from tita.align.sampling import gumbel
from tita.demo.scenes import make_scenes
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM

LENGTH = 6
"""Maximum answer length; answers of the demo have up to two digits."""


def asked(number: int, *, sampling: Sampling, **how: Any) -> list[Request]:
    """The questions of `number` scenes, of different lengths; `how` goes into each request."""
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
    """The same requests with another guidance weight."""
    return [dataclasses.replace(request, guidance=Guidance(weight=weight)) for request in requests]


def log_probs(vlm: VLM, inputs: dict[str, Any], tokens: Sequence[int]) -> torch.Tensor:
    """log p[1, V] after a prompt and `tokens`: one forward over everything, no cache, no batch."""
    answer = torch.tensor([tokens], dtype=torch.long)
    # In PaliGemma prompt tokens attend to each other; answer tokens are causal.
    prompt_sees_ahead = vlm.model.config.model_type == "paligemma"
    values = {"attention_mask": 1, "token_type_ids": int(prompt_sees_ahead)}
    whole = {
        name: torch.cat([each, torch.full_like(answer, values.get(name, 0))], -1)
        if each.shape == inputs["input_ids"].shape
        else each
        for name, each in inputs.items()
    }
    whole["input_ids"] = torch.cat([inputs["input_ids"], answer], -1)
    return log_softmax(vlm.model(**whole).logits[:, -1])


def choice(scores: torch.Tensor, sampling: Sampling, *, position: int) -> int:
    """Sample by temperature, top-k and top-p with sorting, and the seed's noise."""
    if not sampling.temperature:
        return int(scores.argmax())
    ordered, tokens = (scores / sampling.temperature).sort(descending=True)
    ordered = ordered[: sampling.top_k or None]
    probabilities = ordered.softmax(-1)
    kept = tokens[: len(ordered)][probabilities.cumsum(-1) - probabilities < sampling.top_p]
    noise = gumbel(len(scores), seed=sampling.seed, position=position)
    return int(kept[(scores / sampling.temperature + noise)[kept].argmax()])


@torch.inference_mode()
def by_definition(base: VLM, reward: VLM, request: Request) -> list[int]:
    """The answer without cache or batch: both models run over the whole sequence each step."""
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
