"""Both models step by step: rows are admitted, advance together, and are released.

One thread owns it. A step takes in a bounded piece of new prompts and then writes one
token of every answer, so a long prompt delays running answers by one piece at most.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tita.align.answers import Said
from tita.align.choosing import Chosen, Row, choose
from tita.align.guidance import FORMS
from tita.align.lane import Lane, Prefill, PrefixCache
from tita.align.preparing import Prepared
from tita.align.wording import Wording
from tita.errors import TitaError
from tita.vlm import VLM

if TYPE_CHECKING:
    from torch import Tensor


class NoNumbers(TitaError):
    """A model's logits were not numbers."""


@dataclass(slots=True)
class _Entering:
    row: Row
    base: Prefill
    reward: Prefill | None

    @property
    def num_pieces(self) -> int:
        return len(self.base.pieces) + (len(self.reward.pieces) if self.reward else 0)


Outcome = Said | TitaError


class Stepper:
    """Continuous batching over a base model and, for rows that want it, a reward model."""

    def __init__(
        self,
        base: VLM,
        reward: VLM | None = None,
        *,
        form: str = "tita",
        prefill_tokens: int = 512,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Args:
        base: the model that is steered.
        reward: the model that steers; it must know the same tokens by the same numbers.
        form: guidance form of requests that name none.
        prefill_tokens: prompt tokens taken in between two steps.
        prefixes: where the KV of images is kept between prompts; nothing is kept if not given.
        """
        self.prefixes = PrefixCache(0) if prefixes is None else prefixes
        self.base = Lane(base, prefill_tokens=prefill_tokens, prefixes=self.prefixes)
        self.reward = (
            Lane(reward, prefill_tokens=prefill_tokens, prefixes=self.prefixes)
            if reward is not None
            else None
        )
        self._form = form
        self._tokenizer = base.tokenizer
        self._ends = _end_tokens(base)
        self._prefill_tokens = prefill_tokens
        self._entering: dict[Hashable, _Entering] = {}
        self._rows: dict[Hashable, Row] = {}
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self._entering) + len(self._rows)

    @property
    def num_cells(self) -> int:
        """Tokens that the base model's cache has room for right now."""
        return self.base.num_cells

    def admit(self, key: Hashable, prepared: Prepared) -> None:
        """Give a request a place; its prompt is taken in by the steps that follow.

        Raises:
            TitaError: it is to be guided and there is no reward model, or no such form.
        """
        request = prepared.request
        form = check_form(request.form or self._form)
        if self.reward is None and request.weight:
            raise TitaError("guidance without a reward model", remedy="give one, or weight 0")
        row = Row(
            prepared=prepared, wording=Wording(self._tokenizer, request.sampling.stops), form=form
        )
        reward = None
        if self.reward is not None and prepared.reward is not None:
            reward = self.reward.begin(prepared.reward, image_digest=prepared.reward_image_digest)
        base = self.base.begin(prepared.base, image_digest=prepared.image_digest)
        self._entering[key] = _Entering(row, base, reward)

    def release(self, key: Hashable) -> None:
        """Free a request's place, at whatever point it is."""
        self._entering.pop(key, None)
        if self._rows.pop(key, None) is not None:
            self._leave({key})

    def clear(self) -> None:
        """Free all places, after a step that failed."""
        self._leave(set(self._rows))
        self._entering.clear()
        self._rows.clear()

    def step(self) -> list[tuple[Hashable, Outcome]]:
        """Advance; what requests got, in order: none, one or several tokens each.

        A request whose outcome is its last (a `finish_reason`, or an error) has left by itself.
        """
        with _inference():
            said = [*self._decode(), *self._prefill()]
        done = {
            key for key, outcome in said if not isinstance(outcome, Said) or outcome.finish_reason
        }
        for key in done:
            self._rows.pop(key, None)
        self._leave(done)
        self._num_steps += 1
        return said

    def _leave(self, keys: set[Hashable]) -> None:
        self.base.leave(keys)
        if self.reward is not None:
            self.reward.leave(keys)

    def _prefill(self) -> list[tuple[Hashable, Outcome]]:
        said: list[tuple[Hashable, Outcome]] = []
        budget = self._prefill_tokens
        while self._entering and budget > 0:
            key = self._next_entering()
            entering = self._entering[key]
            budget -= self._advance(entering)
            if not entering.num_pieces:
                del self._entering[key]
                said.append((key, self._enter(key, entering)))
        return said

    def _next_entering(self) -> Hashable:
        # Short prompts first, so that they do not wait for long ones; every other step the oldest,
        # so that long ones come in at all.
        if self._num_steps % 2:
            return next(iter(self._entering))
        return min(self._entering, key=lambda key: self._entering[key].num_pieces)

    def _advance(self, entering: _Entering) -> int:
        """Take in the next piece for each model; its number of tokens."""
        num_tokens = 0
        for side in ("base", "reward"):
            lane: Lane | None = getattr(self, side)
            prefill: Prefill | None = getattr(entering, side)
            if lane is None or prefill is None or not prefill.pieces:
                continue
            num_tokens = max(num_tokens, prefill.pieces[0][1] - prefill.pieces[0][0])
            before = lane.seconds
            lane.advance(prefill)
            spent = lane.seconds - before
            if side == "base":
                entering.row.base_s += spent
            else:
                entering.row.reward_s += spent
        return num_tokens

    def _enter(self, key: Hashable, entering: _Entering) -> Outcome:
        assert entering.base.logits is not None
        row, reward = entering.row, entering.reward
        logits = None if reward is None or reward.logits is None else reward.logits.unsqueeze(0)
        [outcome] = self._choose(
            [row], entering.base.logits.unsqueeze(0), logits, guided=[] if logits is None else [0]
        )
        if isinstance(outcome, Said) and outcome.finish_reason is None:
            self.base.join(key, entering.base)
            if self.reward is not None and reward is not None:
                self.reward.join(key, reward)
            self._rows[key] = row
        return outcome

    def _decode(self) -> list[tuple[Hashable, Outcome]]:
        if not self._rows:
            return []
        keys = list(self.base.rows)
        rows = [self._rows[key] for key in keys]
        base_logits = self._timed(self.base, keys, "base_s")
        reward_logits, guided = None, []
        if self.reward is not None and self.reward.rows:
            reward_logits = self._timed(self.reward, self.reward.rows, "reward_s")
            place = {key: number for number, key in enumerate(keys)}
            guided = [place[key] for key in self.reward.rows]
        outcomes = self._choose(rows, base_logits, reward_logits, guided=guided)
        return list(zip(keys, outcomes, strict=True))

    def _timed(self, lane: Lane, keys: Sequence[Hashable], field: str) -> "Tensor":
        before = lane.seconds
        logits = lane.step([self._rows[key].last for key in keys])
        share = (lane.seconds - before) / len(keys)
        for key in keys:
            row = self._rows[key]
            setattr(row, field, getattr(row, field) + share)
        return logits

    def _choose(
        self,
        rows: Sequence[Row],
        base_logits: "Tensor",
        reward_logits: "Tensor | None",
        *,
        guided: Sequence[int],
    ) -> list[Outcome]:
        chosen = choose(rows, base_logits, reward_logits, guided=guided, tokenizer=self._tokenizer)
        return [self._say(row, what) for row, what in zip(rows, chosen, strict=True)]

    def _say(self, row: Row, chosen: Chosen | None) -> Outcome:
        if chosen is None:
            return NoNumbers("the model gave no numbers (NaN)", remedy="check its weights")
        row.last = chosen.token
        request, sampling = row.prepared.request, row.sampling
        ended = chosen.token in sampling.stop_token_ids or (
            chosen.token in self._ends and not sampling.ignore_end
        )
        text, reason = "", "stop" if ended else None
        if not ended:
            row.token_ids.append(chosen.token)
            text = row.wording.add(chosen.token)
            if row.wording.stopped:
                reason = "stop"
            elif len(row.token_ids) >= row.prepared.max_new_tokens:
                reason = "length"
        if reason:
            text += row.wording.finish()
        base_s, reward_s = row.base_s, row.reward_s
        row.base_s = row.reward_s = 0.0
        return Said(
            id=chosen.token,
            text=text,
            token=self._tokenizer.decode([chosen.token]) if request.detailed else "",
            changed=chosen.changed,
            logprob=chosen.logprob,
            base=chosen.base,
            reward=chosen.reward,
            alternatives=chosen.alternatives,
            counted=not ended,
            finish_reason=reason,  # type: ignore[arg-type]
            base_s=base_s,
            reward_s=reward_s,
        )


def warm_up(stepper: Stepper, prepared: Prepared) -> float:
    """Answer once, so that the first client does not wait for lazy set-up; seconds it took."""
    began = time.perf_counter()
    stepper.admit("warm-up", prepared)
    while len(stepper):
        stepper.step()
    return time.perf_counter() - began


def check_form(form: str) -> str:
    """The form, if there is one of that name.

    Raises:
        TitaError: there is none.
    """
    if form not in FORMS:
        raise TitaError(f"no guidance form {form!r}", remedy=f"choose {' or '.join(FORMS)}")
    return form


def _end_tokens(vlm: VLM) -> frozenset[int]:
    configured = vlm.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, vlm.tokenizer.eos_token_id) if end is not None)


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield
