"""Both models step by step: rows are admitted, advance together, and are released.

One thread owns it. A step takes in a bounded piece of new prompts or writes one token of every
answer, in turns where there are both: a long prompt delays running answers by one piece at most,
and who comes in has a first token before others have their next.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

from tita.align.answers import Outcome, is_last
from tita.align.choosing import say
from tita.align.drafting import Drafting
from tita.align.entering import Entering, next_group
from tita.align.guidance import check_form, check_reference
from tita.align.lane import Lane
from tita.align.options import EngineOptions
from tita.align.pacing import Pacing
from tita.align.prefixes import PrefixCache
from tita.align.preparing import Prepared
from tita.align.rows import Row
from tita.align.speculating import speculate
from tita.align.vocabulary import Vocabulary, end_tokens, match_vocabularies, num_logits
from tita.align.wording import Wording
from tita.errors import TitaError
from tita.vlm import VLM

if TYPE_CHECKING:
    from torch import Tensor

Outcomes: TypeAlias = list[tuple[Hashable, Outcome]]


class Stepper:
    """Continuous batching over a base model and, for rows that want it, a reward model."""

    def __init__(
        self,
        base: VLM,
        reward: VLM | None = None,
        *,
        reference: VLM | None = None,
        options: EngineOptions | None = None,
        prefixes: PrefixCache | None = None,
        drafting: Drafting | None = None,
        vocabulary: Vocabulary | Literal["match"] | None = "match",
    ) -> None:
        """Args:
        base: the model that is steered.
        reward: the model that steers, of the base's family.
        reference: the reward model before it was trained, for forms that compare with it.
        options: how to decode; how models are laid out is the engine's affair.
        prefixes: where the KV of images is kept; a room of the options' size if not given.
        drafting: what is known about drafting; nothing if not given.
        vocabulary: what `match_vocabularies` said of these models, if it has been asked before.

        Raises:
            TitaError: the models' vocabularies share too little.
        """
        options = options or EngineOptions()
        if prefixes is None:
            prefixes = PrefixCache(options.prefix_cache_bytes)
        self.prefixes = prefixes
        models = {"base": base, "reward": reward, "reference": reference}
        given = {role: vlm for role, vlm in models.items() if vlm is not None}
        if vocabulary == "match":
            vocabulary = match_vocabularies(base, reward, reference=reference)
        self._vocabulary = vocabulary
        narrowest = min(map(num_logits, given.values()))
        self._lanes = {
            role: Lane(
                vlm,
                num_tokens=narrowest if self._vocabulary is None else num_logits(vlm),
                prefill_tokens=options.prefill_tokens,
                prefixes=self.prefixes,
                vocabulary=None if role == "base" else self._vocabulary,
            )
            for role, vlm in given.items()
        }
        self.base = self._lanes["base"]
        self.reward = self._lanes.get("reward")
        self.reference = self._lanes.get("reference")
        self.drafting = drafting or Drafting(max_drafts=options.max_drafts)
        self._form = options.form
        self._tokenizer = base.tokenizer
        self._ends = frozenset(end_tokens(base))
        self._pacing = Pacing(options.prefill_tokens)
        self._entering: dict[Hashable, Entering] = {}
        self._rows: dict[Hashable, Row] = {}
        self._num_pieces = 0
        self._wrote = True
        """Whether the last step did; a piece of a prompt is next if one waits."""

    def __len__(self) -> int:
        return len(self._entering) + len(self._rows)

    @property
    def num_cells(self) -> int:
        """Tokens that the base model's cache has room for right now."""
        return self.base.num_cells

    def admit(self, key: Hashable, prepared: Prepared) -> None:
        """Give a request a place; its prompt is taken in by the steps that follow.

        Raises:
            TitaError: it is to be guided and a model that this takes is not there, or no such form.
        """
        request = prepared.request
        form = check_form(request.form or self._form)
        if self.reward is None and request.weight:
            raise TitaError("guidance without a reward model", remedy="give one, or weight 0")
        if request.weight:
            check_reference(form, there=prepared.reference is not None)
        row = Row(
            prepared=prepared,
            # With weight 0 every form is the base alone, and nothing is compared.
            form=form if request.weight else "tita",
            vocabulary=self._vocabulary,
            tokenizer=self._tokenizer,
            ends=self._ends,
            wording=Wording(self._tokenizer, request.sampling.stops),
        )
        sides = {
            "base": (prepared.base, prepared.image_digest),
            "reward": (prepared.reward, prepared.reward_image_digest),
            "reference": (prepared.reference, prepared.reward_image_digest),
        }
        with _inference():
            prefills = {
                role: self._lanes[role].begin(
                    inputs, image_digest=digest, max_new_tokens=prepared.max_new_tokens
                )
                for role, (inputs, digest) in sides.items()
                if inputs is not None and role in self._lanes
            }
        self._entering[key] = Entering(row, prefills)

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
        began = time.perf_counter()
        with _inference():
            if self._entering and (self._wrote or not self._rows):
                num_tokens, said = self._prefill()
                self._pacing.took_in(num_tokens, time.perf_counter() - began)
                self._wrote = False
                return said
            said = self._decode()
            done = {key for key, outcome in said if is_last(outcome)}
            for key in done:
                del self._rows[key]
            self._leave(done)
        if said:
            self._pacing.wrote(time.perf_counter() - began)
        self._wrote = True
        return said

    def _leave(self, keys: set[Hashable]) -> None:
        # Rows move up in tensors that were made in a step; outside of one that is not allowed.
        with _inference():
            for lane in self._lanes.values():
                lane.leave(keys)

    def _prefill(self) -> tuple[int, Outcomes]:
        """Take in a piece of a prompt, or several whole ones; its tokens, and who has a first."""
        limit = self._pacing.num_tokens
        # One piece in four is the oldest's, so that it comes in at all.
        group = next_group(self._entering, oldest=self._num_pieces % 4 == 3, budget=limit)
        self._num_pieces += 1
        entering = [self._entering[key] for key in group]
        num_tokens = self._advance(entering, limit=limit)
        return num_tokens, [] if entering[0].num_pieces else self._enter(group, entering)

    def _advance(self, entering: Sequence[Entering], *, limit: int) -> int:
        """Take in the next piece for each model; its number of tokens."""
        num_tokens = 0
        for role, first in entering[0].prefills.items():
            if not first.pieces:
                continue
            lane = self._lanes[role]
            first.shorten(limit)
            start, end = first.pieces[0]
            num_tokens = max(num_tokens, (end - start) * len(entering))
            before = lane.seconds
            logits = lane.advance([each.prefills[role] for each in entering])
            if logits is not None:
                entering[0].logits[role] = logits
            _share([each.row for each in entering], role, lane.seconds - before)
        return num_tokens

    def _enter(self, keys: Sequence[Hashable], entering: Sequence[Entering]) -> Outcomes:
        """Choose the first tokens of rows that came in together, and let them go on."""
        logits, rows = entering[0].logits, [each.row for each in entering]
        everyone = range(len(keys))
        outcomes = say(
            rows,
            logits["base"],
            logits.get("reward"),
            guided=everyone if "reward" in logits else [],
            reference=logits.get("reference"),
            referring=everyone if "reference" in logits else [],
        )
        said = list(zip(keys, outcomes, strict=True))
        for key in keys:
            del self._entering[key]
        going = [n for n, (_, outcome) in enumerate(said) if not is_last(outcome)]
        self._rows |= {keys[n]: rows[n] for n in going}
        for role in entering[0].prefills:
            self._lanes[role].join([(keys[n], entering[n].prefills[role]) for n in going])
        return said

    def _decode(self) -> Outcomes:
        """Write one token of every answer, or some of the only one."""
        if not self._rows:
            return []
        keys = list(self.base.rows)
        if self.reward is not None and self.reward.rows == keys and len(keys) == 1:
            return [(keys[0], outcome) for outcome in self._speculate(self._rows[keys[0]])]
        rows = [self._rows[key] for key in keys]
        number = {key: n for n, key in enumerate(keys)}
        places = {
            role: [number[key] for key in lane.rows]
            for role, lane in self._lanes.items()
            if lane.rows
        }
        logits = {role: self._step(role) for role in places}
        outcomes = say(
            rows,
            logits["base"],
            logits.get("reward"),
            guided=places.get("reward", []),
            reference=logits.get("reference"),
            referring=places.get("reference", []),
        )
        return list(zip(keys, outcomes, strict=True))

    def _speculate(self, row: Row) -> list[Outcome]:
        assert self.reward is not None
        # Who comes in is not to wait for drafts that may be in vain.
        limit = 0 if self._entering else row.num_left - 1
        num_drafts = self.drafting.num_drafts(row.agreement, limit=limit)
        return speculate(
            row,
            self.base,
            self.reward,
            reference=self.reference if self.reference and self.reference.rows else None,
            drafting=self.drafting,
            num_drafts=num_drafts,
        )

    def _step(self, role: str) -> "Tensor":
        lane = self._lanes[role]
        before = lane.seconds
        rows = [self._rows[key] for key in lane.rows]
        logits = lane.step([row.last for row in rows])
        _share(rows, role, lane.seconds - before)
        return logits


def _share(rows: Sequence[Row], role: str, seconds: float) -> None:
    """Put a model's time down to the rows that it was spent on; the reference steers, too."""
    for row in rows:
        if role == "base":
            row.base_s += seconds / len(rows)
        else:
            row.reward_s += seconds / len(rows)


def warm_up(stepper: Stepper, prepared: Prepared) -> float:
    """Answer once, so that the first client does not wait for lazy set-up; seconds it took."""
    began = time.perf_counter()
    stepper.admit("warm-up", prepared)
    while len(stepper):
        stepper.step()
    return time.perf_counter() - began


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield
