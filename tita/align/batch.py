"""Continuous batching over a base model and the models that steer it.

Not thread-safe. A step either takes in a chunk of new prompts or generates one token of every
running answer; with both to do, they alternate. So a long prompt delays running answers by one
chunk at most, and a new request gets its first token before running ones get their next.
"""

import time
from collections.abc import Hashable
from typing import TypeAlias

import torch

from tita.align.kv_cache import PrefixCache
from tita.align.model_runner import ModelRunner
from tita.align.prefill import ChunkPacer, PendingPrefill, next_group
from tita.align.prompts import PreparedRequest
from tita.align.requests import UNGUIDED, EngineOptions, Outcome, is_last
from tita.align.sampling import RoleLogits, sample
from tita.align.sequence import Detokenizer, Sequence
from tita.align.speculative import DraftPolicy, speculate
from tita.align.vocabulary import Vocabulary, end_tokens, num_logits
from tita.errors import TitaError
from tita.vlm.loading import Models

Outcomes: TypeAlias = list[tuple[Hashable, Outcome]]
"""Each with the key of its request."""


class Batch:
    """The requests that an engine works on."""

    def __init__(
        self,
        models: Models,
        options: EngineOptions,
        *,
        vocabulary: Vocabulary | None,
        prefix_cache: PrefixCache,
        draft_policy: DraftPolicy,
    ) -> None:
        """Args:
        models: the loaded models.
        options: `prefill_tokens` applies.
        vocabulary: maps the reward model's token ids to the base model's, if they differ.
        prefix_cache: cache of the KV of images.
        draft_policy: chooses the number of drafts.
        """
        vlms = models.by_role()
        narrowest = min(map(num_logits, vlms.values()))
        self.runners = {
            role: ModelRunner(
                vlm,
                num_tokens=narrowest if vocabulary is None else num_logits(vlm),
                prefill_tokens=options.prefill_tokens,
                prefix_cache=prefix_cache,
                vocabulary=None if role == "base" else vocabulary,
            )
            for role, vlm in vlms.items()
        }
        """By role of the model."""
        self.prefix_cache = prefix_cache
        self.draft_policy = draft_policy
        self._vocabulary = vocabulary
        self._tokenizer = models.base.tokenizer
        self._ends = frozenset(end_tokens(models.base))
        self._pacer = ChunkPacer(options.prefill_tokens)
        self._pending: dict[Hashable, PendingPrefill] = {}
        self._running: dict[Hashable, Sequence] = {}
        self._num_chunks = 0
        self._decoded = True
        """Whether the last step was a decode step; then a pending prompt is next."""

    def __len__(self) -> int:
        return len(self._pending) + len(self._running)

    @torch.inference_mode()
    def admit(self, key: Hashable, prepared: PreparedRequest) -> None:
        """Add a request; the following steps take in its prompt.

        Raises:
            TitaError: its guidance needs a model that is not loaded.
        """
        guidance = prepared.request.guidance
        if guidance.weight and "reward" not in self.runners:
            raise TitaError("guidance without a reward model", remedy="give one, or weight 0")
        if guidance.needs_reference and "reference" not in prepared.inputs:
            raise TitaError(
                f"form {guidance.form} without a reference model",
                remedy="give the reward model as it was before DPO, or choose another form",
            )
        sampling = prepared.request.sampling
        sequence = Sequence(
            prepared=prepared,
            guidance=guidance if guidance.weight else UNGUIDED,
            vocabulary=self._vocabulary,
            tokenizer=self._tokenizer,
            ends=self._ends,
            detokenizer=Detokenizer(
                self._tokenizer, sampling.stops, min_tokens=sampling.min_new_tokens
            ),
        )
        prefills = {
            role: self.runners[role].begin_prefill(
                inputs,
                image_digest=prepared.image_digests[role],
                max_new_tokens=prepared.max_new_tokens,
            )
            for role, inputs in prepared.inputs.items()
        }
        sequence.num_cached_tokens = prefills["base"].num_cached
        self._pending[key] = PendingPrefill(sequence, prefills)

    def release(self, key: Hashable) -> None:
        """Remove a request, whatever its state."""
        self._pending.pop(key, None)
        if self._running.pop(key, None) is not None:
            self._remove({key})

    def clear(self) -> None:
        """Remove all requests, after a step that failed."""
        self._remove(set(self._running))
        self._pending.clear()
        self._running.clear()

    @torch.inference_mode()
    def step(self) -> Outcomes:
        """Run one step; returns what requests got, in order: none, one or several tokens each.

        A request that got its last outcome (a `finish_reason`, or an error) is removed.
        """
        began = time.perf_counter()
        if self._pending and (self._decoded or not self._running):
            num_tokens, outcomes = self._prefill()
            self._pacer.note_chunk(num_tokens, time.perf_counter() - began)
            self._decoded = False
            return outcomes
        outcomes = self._decode()
        done = {key for key, outcome in outcomes if is_last(outcome)}
        for key in done:
            del self._running[key]
        self._remove(done)
        if outcomes:
            self._pacer.note_decode(time.perf_counter() - began)
        self._decoded = True
        return outcomes

    def warm_up(self, prepared: PreparedRequest) -> float:
        """Answer a request, so that no client waits for lazy set-up; returns the seconds."""
        began = time.perf_counter()
        self.admit("warm-up", prepared)
        while len(self):
            self.step()
        return time.perf_counter() - began

    @torch.inference_mode()
    def _remove(self, keys: set[Hashable]) -> None:
        # Rows move within tensors that were made in inference mode, so it is needed here, too.
        for runner in self.runners.values():
            runner.remove(keys)

    def _decode(self) -> Outcomes:
        """One token of every running answer, or several of a single one."""
        if not self._running:
            return []
        keys = list(self.runners["base"].keys)
        active = {role: runner for role, runner in self.runners.items() if runner.keys}
        if len(keys) == 1 and "reward" in active:
            sequence, policy = self._running[keys[0]], self.draft_policy
            # A new request must not wait for drafts, which may be rejected.
            limit = 0 if self._pending else sequence.num_left - 1
            num_drafts = policy.num_drafts(sequence.agreement, limit=limit)
            outcomes = speculate(sequence, active, policy=policy, num_drafts=num_drafts)
            return [(keys[0], outcome) for outcome in outcomes]
        sequences = [self._running[key] for key in keys]
        index = {key: n for n, key in enumerate(keys)}
        outputs: dict[str, RoleLogits] = {}
        for role, runner in active.items():
            rows = [index[key] for key in runner.keys]
            before = runner.seconds
            logits = runner.decode([sequences[n].last for n in rows])
            _share_time([sequences[n] for n in rows], role, runner.seconds - before)
            outputs[role] = RoleLogits(logits, rows)
        return list(zip(keys, sample(sequences, outputs), strict=True))

    def _prefill(self) -> tuple[int, Outcomes]:
        """Take in a chunk of a prompt, or several whole prompts; its tokens, and first outcomes."""
        limit = self._pacer.num_tokens
        # Every fourth chunk is the oldest request's, so that no prompt is starved.
        keys = next_group(self._pending, oldest=self._num_chunks % 4 == 3, budget=limit)
        self._num_chunks += 1
        group = [self._pending[key] for key in keys]
        num_tokens = 0
        for role, first in group[0].prefills.items():
            if not first.chunks:
                continue
            runner = self.runners[role]
            first.shorten(limit)
            start, end = first.chunks[0]
            num_tokens = max(num_tokens, (end - start) * len(group))
            before = runner.seconds
            logits = runner.prefill([each.prefills[role] for each in group])
            if logits is not None:
                group[0].logits[role] = logits
            _share_time([each.sequence for each in group], role, runner.seconds - before)
        return num_tokens, [] if group[0].num_left else self._start(keys, group)

    def _start(self, keys: list[Hashable], group: list[PendingPrefill]) -> Outcomes:
        """Sample the first tokens of requests that were taken in together, and run them."""
        rows = list(range(len(keys)))
        sequences = [each.sequence for each in group]
        outputs = {role: RoleLogits(logits, rows) for role, logits in group[0].logits.items()}
        outcomes = sample(sequences, outputs)
        for key in keys:
            del self._pending[key]
        going = [n for n in rows if not is_last(outcomes[n])]
        self._running |= {keys[n]: sequences[n] for n in going}
        for role in group[0].prefills:
            self.runners[role].add([(keys[n], group[n].prefills[role]) for n in going])
        return list(zip(keys, outcomes, strict=True))


def _share_time(sequences: list[Sequence], role: str, seconds: float) -> None:
    """Add a model's time to the sequences it ran for; the reference counts as reward."""
    for sequence in sequences:
        if role == "base":
            sequence.base_s += seconds / len(sequences)
        else:
            sequence.reward_s += seconds / len(sequences)
