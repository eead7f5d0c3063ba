"""Reference results: greedy and sampled answers computed without caches or batches."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from tita.align import Guidance, Request, Sampling
from tita.align.draws import gumbel
from tita.align.guidance import log_softmax
from tita.align.prompts import PreparedRequest
from tita.align.sequence import Sequence as AnswerSequence
from tita.align.views import image_digest
from tita.demo.scenes import make_scenes
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, Models
from tita.vlm.noise import noise_factors
from tita.vlm.prompts import Prompt

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


def perturbed(vlm: VLM, *, seed: int) -> VLM:
    """The model with noise on its weights."""
    model = copy.deepcopy(vlm.model)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=dice)
    return dataclasses.replace(vlm, model=model)


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


class Definition:
    """The distribution of a request's next token: every model over everything, at every token."""

    def __init__(self, models: Models, request: Request) -> None:
        self._models = models.by_role()
        self._rewards = list(models.rewards)
        self._request = request
        self._inputs: dict[tuple[str, str, str], dict[str, Any]] = {}

    def log_p(
        self, tokens: Sequence[int], model: str = "base", *, image: str = "own", text: str = ""
    ) -> torch.Tensor:
        """log p[1, V] of one model in one view."""
        key = (model, image, text)
        if key not in self._inputs:
            self._inputs[key] = self._prepare(*key)
        return log_probs(self._models[model], self._inputs[key], tokens)

    def _prepare(self, model: str, image: str, text: str) -> dict[str, Any]:
        asked = self._request
        question = f"{text}\n{asked.question}" if text else asked.question
        shown = () if image == "none" else asked.images
        inputs = prepare(self._models[model], [Prompt(text=question, images=shown)])  # type: ignore[arg-type]
        if image == "distorted" and shown:
            keep, add = noise_factors(asked.guidance.noise_step, schedule="seva")
            seed = int(image_digest(asked)[:12], 16)
            for name in [name for name in inputs if "pixel_values" in name]:
                pixels = inputs[name]
                noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
                inputs[name] = keep * pixels + add * noise
        return inputs

    def scores(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Combined scores[1, V] after `tokens`, and the base's log-probabilities."""
        guidance = self._request.guidance
        w, base = guidance.weight, self.log_p(tokens)
        weights = dict(guidance.weights) or dict.fromkeys(self._rewards[:1], w)
        form = guidance.form if guidance.active else "none"
        rewards = {
            name: self.log_p(tokens, name) for name in (weights if guidance.uses_rewards else ())
        }
        if form == "none":
            return base, base
        if form == "tita":
            scores = (1 - sum(weights.values())) * base
            scores = scores + sum(weights[name] * each for name, each in rewards.items())
        elif form == "genarm":
            scores = base + sum(weights[name] * each for name, each in rewards.items())
        elif form == "dpo":
            before = self.log_p(tokens, "reference")
            scores = base + sum(weights[n] * (each - before) for n, each in rewards.items())
        elif form == "tita_vcd":
            w, a = sum(weights.values()), guidance.contrast
            contrasted = (1 + a) * base - a * self.log_p(tokens, image="distorted")
            scores = (1 - w) * (contrasted if w < 1 else base)
            scores = scores + sum(weights[name] * each for name, each in rewards.items())
        elif form == "vcd":
            scores = (1 + w) * base - w * self.log_p(tokens, image="distorted")
        elif form == "m3id":
            fading = math.exp(-w * (len(tokens) + 1))
            contrast = base - self.log_p(tokens, image="none")
            scores = base + (1 - fading) / fading * contrast
        elif guidance.text:
            scores = w * self.log_p(tokens, text=guidance.text) + (1 - w) * base
        else:
            scores = w * base + (1 - w) * self.log_p(tokens, image="none")
        if guidance.plausibility:
            floor = base.max() + math.log(guidance.plausibility)
            scores = torch.where(base < floor, -torch.inf, scores)
        return scores, base


@torch.inference_mode()
def by_definition(models: Models, request: Request) -> list[int]:
    """The answer without cache or batch: the models run over the whole sequence each step."""
    definition, tokens = Definition(models, request), list[int]()
    while len(tokens) < request.sampling.max_new_tokens:
        scores, _ = definition.scores(tokens)
        token = choice(scores[0], request.sampling, position=len(tokens))
        if token == models.base.tokenizer.eos_token_id and not request.sampling.ignore_end:
            break
        tokens.append(token)
    return tokens


def sampled_sequence(
    guidance: Guidance, *, rewards: Sequence[str], seed: int, num_tokens: int
) -> AnswerSequence:
    """A sequence that samples its token number `num_tokens`, without models."""
    sampling = Sampling(max_new_tokens=99, temperature=1.0, seed=seed)
    request = Request(question="", guidance=guidance, sampling=sampling)
    prepared = PreparedRequest(
        request=request, inputs={}, image_digests={}, num_prompt_tokens=1, max_new_tokens=99,
        terms=guidance.terms(rewards, has_images=True),
    )  # fmt: skip
    return AnswerSequence(
        prepared=prepared,
        tokenizer=None,
        ends=frozenset(),
        detokenizer=None,  # type: ignore[arg-type]
        token_ids=[0] * num_tokens,
    )
