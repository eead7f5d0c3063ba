"""The engine: base and reward model in lockstep, each with its own cache, a weight per request.

Legend: B rows of a batch, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tita.align.decoder import Decoder
from tita.align.guidance import FORMS, log_softmax
from tita.align.requests import Answer, Request, Token
from tita.errors import TitaError
from tita.vlm import VLM

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True)
class _Row:
    """What one request has been answered so far."""

    request: Request
    num_prompt_tokens: int
    generator: "torch.Generator"
    token_ids: list[int] = field(default_factory=list)
    num_changed: int = 0
    tokens: list[Token] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.request.sampling.max_new_tokens


class Engine:
    """Answers questions with a base model that a reward model guides.

    Both models must know the same tokens by the same numbers.
    """

    def __init__(self, base: VLM, reward: VLM | None = None, *, form: str = "tita") -> None:
        """Args:
            base: the frozen model that is steered.
            reward: the model that steers; without one, only weight 0 can be asked for.
            form: a key of `guidance.FORMS`.

        Raises:
            TitaError: the vocabularies differ, or there is no such form.
        """
        if form not in FORMS:
            raise TitaError(f"no guidance form {form!r}", remedy=f"choose {' or '.join(FORMS)}")
        if reward is not None:
            _check_vocabularies(base, reward)
        self.base = base
        self.reward = reward
        self._combine = FORMS[form]
        self._end = _end_tokens(base)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer a batch; the answers stand in the order of the requests."""
        if not requests:
            return []
        if self.reward is None and any(request.weight for request in requests):
            raise TitaError("guidance without a reward model", remedy="give one, or weight 0")
        with _inference():
            return self._generate(requests)

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        import torch

        base = Decoder(self.base, [request.base_prompt for request in requests])
        guided = any(request.weight or request.explain for request in requests)
        reward = (
            Decoder(self.reward, [request.reward_prompt for request in requests])
            if self.reward is not None and guided
            else None
        )
        rows = [
            _Row(request, length, torch.Generator().manual_seed(request.sampling.seed))
            for request, length in zip(requests, base.num_prompt_tokens, strict=True)
        ]
        active = list(rows)
        base_logits = base.prefill()
        reward_logits = reward.prefill() if reward else None
        while True:
            tokens = self._choose(active, base_logits, reward_logits)
            going = [index for index, row in enumerate(active) if not row.done]
            if not going:
                break
            if len(going) < len(active):
                keep = torch.tensor(going)
                active, tokens = [active[index] for index in going], tokens[keep]
                base.keep(keep)
                if reward:
                    reward.keep(keep)
            base_logits = base.step(tokens)
            reward_logits = reward.step(tokens) if reward else None
        return [self._answer(row) for row in rows]

    def _choose(
        self, rows: Sequence[_Row], base_logits: "Tensor", reward_logits: "Tensor | None"
    ) -> "Tensor":
        """Pick one token a row, write it down, and return tokens[B]."""
        import torch

        base = log_softmax(base_logits)
        if reward_logits is None:
            reward = combined = base
        else:
            reward = log_softmax(reward_logits.to(base.device))
            weights = torch.tensor([row.request.weight for row in rows], device=base.device)
            combined = self._combine(base, reward, weights)
        tokens = _pick(rows, combined)
        alone = base.argmax(-1)
        for index, row in enumerate(rows):
            token = int(tokens[index])
            changed = token != int(alone[index])
            row.num_changed += changed
            row.stopped = token in self._end
            if not row.stopped:
                row.token_ids.append(token)
            if row.request.explain:
                row.tokens.append(
                    Token(
                        id=token,
                        text=self.base.tokenizer.decode([token]),
                        base=float(base[index, token]),
                        reward=float(reward[index, token]),
                        combined=float(torch.log_softmax(combined[index], -1)[token]),
                        changed=changed,
                    )
                )
        return tokens

    def _answer(self, row: _Row) -> Answer:
        return Answer(
            text=self.base.tokenizer.decode(row.token_ids, skip_special_tokens=True).strip(),
            token_ids=tuple(row.token_ids),
            finish_reason="stop" if row.stopped else "length",
            num_prompt_tokens=row.num_prompt_tokens,
            num_changed=row.num_changed,
            tokens=tuple(row.tokens),
        )


def _pick(rows: Sequence[_Row], scores: "Tensor") -> "Tensor":
    """One token a row from scores[B, V]: the best, or one drawn at the row's temperature."""
    tokens = scores.argmax(-1).cpu()
    for index, row in enumerate(rows):
        temperature = row.request.sampling.temperature
        if temperature:
            chances = (scores[index] / temperature).softmax(-1).cpu()
            tokens[index] = chances.multinomial(1, generator=row.generator)
    return tokens


def _end_tokens(vlm: VLM) -> frozenset[int]:
    configured = vlm.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, vlm.tokenizer.eos_token_id) if end is not None)


def _check_vocabularies(base: VLM, reward: VLM) -> None:
    ours, theirs = base.tokenizer.get_vocab(), reward.tokenizer.get_vocab()
    if ours == theirs:
        return
    shared = sum(theirs.get(token) == number for token, number in ours.items())
    unlike = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))[0]
    raise TitaError(
        f"vocabularies differ: {shared} of {len(ours)} tokens agree, {unlike!r} does not",
        where=f"{base.name} and {reward.name}",
        remedy="choose a reward model of the base model's family",
    )


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield
