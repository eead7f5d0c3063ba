"""Both models step by step: rows are admitted, advance together, and are released.

One thread owns it. A step takes in a bounded piece of new prompts and then writes one token of
every answer, so a long prompt delays running answers by one piece at most.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tita.align.answers import Outcome, is_last
from tita.align.choosing import say
from tita.align.drafting import Drafting
from tita.align.guidance import FORMS
from tita.align.lane import Lane
from tita.align.prefill import Prefill
from tita.align.prefixes import PrefixCache
from tita.align.preparing import Prepared
from tita.align.rows import Row
from tita.align.speculating import speculate
from tita.align.wording import Wording
from tita.errors import TitaError
from tita.vlm import VLM

if TYPE_CHECKING:
    from torch import Tensor

Outcomes: TypeAlias = list[tuple[Hashable, Outcome]]


@dataclass(slots=True)
class _Entering:
    row: Row
    base: Prefill
    reward: Prefill | None
    base_logits: "Tensor | None" = None
    """[B, V] of the first new tokens of those that came in together, once its prompt is in."""
    reward_logits: "Tensor | None" = None

    @property
    def num_pieces(self) -> int:
        return len(self.base.pieces) + (len(self.reward.pieces) if self.reward else 0)

    @property
    def kind(self) -> tuple[Hashable, ...] | None:
        """Rows of the same kind come in together; None: only by itself."""
        kinds = self.base.kind, self.reward.kind if self.reward else ()
        return None if None in kinds else kinds


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
        drafting: Drafting | None = None,
    ) -> None:
        """Args:
        base: the model that is steered.
        reward: the model that steers; it must know the same tokens by the same numbers.
        form: guidance form of requests that name none.
        prefill_tokens: prompt tokens taken in between two steps.
        prefixes: where the KV of images is kept between prompts; nothing is kept if not given.
        drafting: what is known about drafting; nothing if not given.
        """
        self.prefixes = PrefixCache(0) if prefixes is None else prefixes
        num_tokens = min(_num_tokens(vlm) for vlm in (base, reward) if vlm is not None)

        def lane(vlm: VLM) -> Lane:
            return Lane(
                vlm,
                num_tokens=num_tokens,
                prefill_tokens=prefill_tokens,
                prefixes=self.prefixes,
            )

        self.base = lane(base)
        self.reward = None if reward is None else lane(reward)
        self.drafting = drafting or Drafting()
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
            prepared=prepared,
            form=form,
            tokenizer=self._tokenizer,
            ends=self._ends,
            wording=Wording(self._tokenizer, request.sampling.stops),
        )
        reward = None
        with _inference():
            base = self.base.begin(prepared.base, image_digest=prepared.image_digest)
            if self.reward is not None and prepared.reward is not None:
                digest = prepared.reward_image_digest
                reward = self.reward.begin(prepared.reward, image_digest=digest)
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

    def step(self) -> Outcomes:
        """Advance; what requests got, in order: none, one or several tokens each.

        A request whose outcome is its last (a `finish_reason`, or an error) has left by itself.
        """
        with _inference():
            said = self._decode()
            done = {key for key, outcome in said if is_last(outcome)}
            for key in done:
                del self._rows[key]
            self._leave(done)
            said += self._prefill()
        self._num_steps += 1
        return said

    def _leave(self, keys: set[Hashable]) -> None:
        # Rows move up in tensors that were made in a step; outside of one that is not allowed.
        with _inference():
            self.base.leave(keys)
            if self.reward is not None:
                self.reward.leave(keys)

    def _prefill(self) -> Outcomes:
        said: Outcomes = []
        budget = self._prefill_tokens
        while self._entering and budget > 0:
            group = self._next_entering(budget)
            entering = [self._entering[key] for key in group]
            budget -= self._advance(entering)
            if not entering[0].num_pieces:
                said += self._enter(group, entering)
        return said

    def _next_entering(self, budget: int) -> list[Hashable]:
        """The request that is next, and others that can come in together with it."""
        # Short prompts first, so that they do not wait for long ones; every other step the oldest,
        # so that long ones come in at all.
        if self._num_steps % 2:
            first = next(iter(self._entering))
        else:
            first = min(self._entering, key=lambda key: self._entering[key].num_pieces)
        kind = self._entering[first].kind
        group, longest = [first], self._entering[first].base.length
        if kind is None:
            return group
        for key, entering in self._entering.items():
            wider = max(longest, entering.base.length)
            if key != first and entering.kind == kind and wider * (len(group) + 1) <= budget:
                group.append(key)
                longest = wider
        return group

    def _advance(self, entering: Sequence[_Entering]) -> int:
        """Take in the next piece for each model; its number of tokens."""
        num_tokens = 0
        for side in ("base", "reward"):
            lane: Lane | None = getattr(self, side)
            prefills: list[Prefill] = [p for each in entering if (p := getattr(each, side))]
            if lane is None or not prefills or not prefills[0].pieces:
                continue
            start, end = prefills[0].pieces[0]
            num_tokens = max(num_tokens, (end - start) * len(prefills))
            before = lane.seconds
            setattr(entering[0], f"{side}_logits", lane.advance(prefills))
            _share([each.row for each in entering], side, lane.seconds - before)
        return num_tokens

    def _enter(self, keys: Sequence[Hashable], entering: Sequence[_Entering]) -> Outcomes:
        """Choose the first tokens of rows that came in together, and let them go on."""
        base, reward = entering[0].base_logits, entering[0].reward_logits
        assert base is not None
        guided = [] if reward is None else range(len(keys))
        rows = [each.row for each in entering]
        said = list(zip(keys, say(rows, base, reward, guided=guided), strict=True))
        for key in keys:
            del self._entering[key]
        going = [n for n, (_, outcome) in enumerate(said) if not is_last(outcome)]
        self._rows |= {keys[n]: rows[n] for n in going}
        self.base.join([(keys[n], entering[n].base) for n in going])
        if self.reward is not None:
            sides = [(keys[n], entering[n].reward) for n in going]
            self.reward.join([(key, side) for key, side in sides if side is not None])
        return said

    def _decode(self) -> Outcomes:
        """Write one token of every answer, or some of the only one."""
        if not self._rows:
            return []
        keys = list(self.base.rows)
        if self.reward is not None and self.reward.rows == keys and len(keys) == 1:
            return [(keys[0], outcome) for outcome in self._speculate(self._rows[keys[0]])]
        rows = [self._rows[key] for key in keys]
        base_logits = self._step(self.base, "base")
        reward_logits, guided = None, []
        if self.reward is not None and self.reward.rows:
            reward_logits = self._step(self.reward, "reward")
            place = {key: number for number, key in enumerate(keys)}
            guided = [place[key] for key in self.reward.rows]
        outcomes = say(rows, base_logits, reward_logits, guided=guided)
        return list(zip(keys, outcomes, strict=True))

    def _speculate(self, row: Row) -> list[Outcome]:
        assert self.reward is not None
        # Who comes in is not to wait for drafts that may be in vain.
        limit = 0 if self._entering else row.num_left - 1
        num_drafts = self.drafting.num_drafts(row.agreement, limit=limit)
        return speculate(row, self.base, self.reward, drafting=self.drafting, num_drafts=num_drafts)

    def _step(self, lane: Lane, side: str) -> "Tensor":
        before = lane.seconds
        rows = [self._rows[key] for key in lane.rows]
        logits = lane.step([row.last for row in rows])
        _share(rows, side, lane.seconds - before)
        return logits


def _share(rows: Sequence[Row], side: str, seconds: float) -> None:
    """Put a model's time down to the rows that it was spent on."""
    for row in rows:
        name = f"{side}_s"
        setattr(row, name, getattr(row, name) + seconds / len(rows))


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


def _num_tokens(vlm: VLM) -> int:
    return int(vlm.model.config.get_text_config().vocab_size)


def _end_tokens(vlm: VLM) -> frozenset[int]:
    configured = vlm.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, vlm.tokenizer.eos_token_id) if end is not None)


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield
