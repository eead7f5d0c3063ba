"""Continuous batching over a base model and the models that steer it.

Not thread-safe. A step either takes in a chunk of new prompts or generates one token of every
running answer; with both to do, they alternate. So a long prompt delays running answers by one
chunk at most, and a new request gets its first token before running ones get their next.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Container, Hashable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from tita.align.adapter_room import AdapterRoom
from tita.align.draws import Workspace
from tita.align.failures import Failure, examine
from tita.align.kv_cache import PrefixCache
from tita.align.model_runner import ModelRunner, ParkedRow
from tita.align.prefill import ChunkPacer, PendingPrefill, next_group, sharing
from tita.align.prompts import PreparedRequest
from tita.align.recovery import Checkpoint, ParkedSequence, RowLimit, halves
from tita.align.requests import EngineOptions, Outcome, is_last
from tita.align.sampling import SourceLogits, sample
from tita.align.sequence import Detokenizer, Sequence
from tita.align.speculative import DraftPolicy, speculate
from tita.align.vocabulary import Vocabularies, end_tokens, num_logits
from tita.vlm.loading import Models

logger = logging.getLogger(__name__)

_MAX_PREFILL_OUT_OF_MEMORY = 4
"""Times that a prompt which is alone may run out of memory; each halves the length of a chunk."""

Outcomes: TypeAlias = list[tuple[Hashable, Outcome]]
"""Each with the key of its request."""


class Batch:
    """The requests that an engine works on."""

    def __init__(
        self,
        models: Models,
        options: EngineOptions,
        *,
        vocabularies: Vocabularies,
        prefix_cache: PrefixCache,
        draft_policy: DraftPolicy,
    ) -> None:
        """Args:
        models: the loaded models.
        options: `prefill_tokens` and `max_draft_rows` apply.
        vocabularies: of the models.
        prefix_cache: cache of the KV of images.
        draft_policy: chooses the number of drafts.
        """
        vlms = models.by_role()
        self._shared = {
            role: role
            if vlm.adapters is None
            else next(first for first, other in vlms.items() if other.model is vlm.model)
            for role, vlm in vlms.items()
        }
        """By role: the first role of the same model, which differs if that has adapters."""
        self.runners = {
            role: ModelRunner(
                vlm,
                num_tokens=num_logits(vlm) if role in vocabularies.maps else vocabularies.width,
                prefill_tokens=options.prefill_tokens,
                prefix_cache=prefix_cache,
                vocabulary=vocabularies.maps.get(role),
                adapters={
                    name: vlms[name].adapter
                    for name, first in self._shared.items()
                    if first == role
                },
            )
            for role, vlm in vlms.items()
            if self._shared[role] == role
        }
        """By role of the model; the first one, of a model with several."""
        self._adapter_room = AdapterRoom(models)
        self.prefix_cache = prefix_cache
        self.draft_policy = draft_policy
        self._tokenizer = models.base.tokenizer
        self._ends = frozenset(end_tokens(models.base))
        self._pacer = ChunkPacer(options.prefill_tokens)
        self._workspace = Workspace()
        self._max_draft_rows = options.max_draft_rows
        self._pending: dict[Hashable, PendingPrefill] = {}
        self._running: dict[Hashable, Sequence] = {}
        """Those with rows in the models."""
        self._parked: dict[Hashable, ParkedSequence] = {}
        self._limit = RowLimit()
        self._num_admitted = 0
        self._num_chunks = 0
        self._decoded = True
        """Whether the last step was a decode step; then a pending prompt is next."""

    def __len__(self) -> int:
        return len(self._pending) + len(self._running) + len(self._parked)

    @torch.inference_mode()
    def admit(self, key: Hashable, prepared: PreparedRequest) -> None:
        """Add a request; the following steps take in its prompt.

        Raises:
            TitaError: it cannot be taken in.
        """
        sources = self._adapter_room.without_extras(prepared.inputs, prepared)
        self._adapter_room.check(sources)
        if len(sources) < len(prepared.inputs):
            inputs = {name: prepared.inputs[name] for name in sources}
            prepared = dataclasses.replace(prepared, inputs=inputs)
        self._pending[key] = self._begin(prepared, number=self._num_admitted)
        self._num_admitted += 1

    def release(self, key: Hashable) -> None:
        """Remove a request, whatever its state."""
        if key in self._running:
            self._remove({key})
            del self._running[key]
        self._pending.pop(key, None)
        self._parked.pop(key, None)

    def clear(self) -> None:
        """Remove all requests. Runs no tensor operation, so it works on a device that is lost."""
        for runner in self.runners.values():
            runner.clear()
        self._pending.clear()
        self._running.clear()
        self._parked.clear()
        self._limit.clear()

    @torch.inference_mode()
    def step(self) -> Outcomes:
        """Run one step; returns what requests got, in order: none, one or several tokens each.

        A request that got its last outcome (a `finish_reason`, or an error) is removed.

        A step that fails leaves no trace. It is repeated without the requests that came last, then
        with halves of the rest, until the request that breaks it is alone; that one gets the error,
        and the others go on with the tokens that they would have had. If memory runs out, the
        newest answers wait in host memory until others have ended.

        Raises:
            AcceleratorError: the device is lost. `clear` the batch.
        """
        outcomes = self._resume()
        # Parked answers come before new prompts.
        may_prefill = not self._parked and self._limit.room(len(self._running))
        ready = self._startable() if self._pending and may_prefill else {}
        if ready and (self._decoded or not self._running):
            self._decoded = False
            outcomes += self._prefill(ready)
        else:
            self._decoded = True
            outcomes += self._decode()
        if not len(self):
            self._limit.clear()
        return outcomes

    def _begin(self, prepared: PreparedRequest, *, number: int) -> PendingPrefill:
        sampling = prepared.request.sampling
        sequence = Sequence(
            number=number,
            prepared=prepared,
            tokenizer=self._tokenizer,
            ends=self._ends,
            detokenizer=Detokenizer(
                self._tokenizer, sampling.stops, min_tokens=sampling.min_new_tokens
            ),
        )
        prefills = {
            source: self._runner_of(source).begin_prefill(
                inputs,
                source=source,
                image_digest=prepared.image_digests[source],
                max_new_tokens=prepared.max_new_tokens,
            )
            for source, inputs in prepared.inputs.items()
        }
        sequence.num_cached_tokens = prefills["base"].num_cached
        return PendingPrefill(sequence, prefills)

    def _startable(self) -> Mapping[Hashable, PendingPrefill]:
        """The pending requests that may be taken in now."""
        parked = (each.sequence for each in self._parked.values())
        running = (each.prepared for each in (*self._running.values(), *parked))
        return self._adapter_room.startable(self._pending, running)

    def _runner_of(self, source: str) -> ModelRunner:
        """The runner of a source's model."""
        return self.runners[self._shared[source.partition("/")[0]]]

    @torch.inference_mode()
    def _remove(self, keys: set[Hashable]) -> None:
        # Rows move within tensors that were made in inference mode, so it is needed here, too.
        for runner in self.runners.values():
            runner.remove(keys)

    def _retire(self, outcomes: Outcomes) -> None:
        """Remove the running requests that got their last outcome."""
        done = {key for key, outcome in outcomes if is_last(outcome)}
        if done:
            self._remove(done)
            for key in done:
                del self._running[key]
            self._limit.note_ended(len(done))

    def _decode(self) -> Outcomes:
        """One token of every running answer, or several of a single one."""
        if not self._running:
            return []
        began, num_rows = time.perf_counter(), len(self._running)
        outcomes = self._decode_surviving()
        if len(outcomes) >= num_rows:
            self._pacer.note_decode(time.perf_counter() - began)
        return outcomes

    def _decode_surviving(self, *, again: bool = False) -> Outcomes:
        """A decode step of the rows in the models; if it fails, of parts of them."""
        checkpoint = Checkpoint.of(self.runners, [*self._running.values()])
        failure = None
        try:
            outcomes = self._decode_once(may_draft=not again)
        except Exception as error:
            failure = examine(error)
        if failure is None:
            self._retire(outcomes)
            return outcomes
        # Here, and not in the handler, which holds the tensors of the failed step.
        checkpoint.restore()
        outcomes = self._free_memory() if failure.out_of_memory else []
        if len(self._running) == 1:
            if not again:
                return outcomes + self._decode_surviving(again=True)
            (key,) = self._running
            blamed = [self._blame(key, failure)]
            self._retire(blamed)
            return outcomes + blamed
        if failure.out_of_memory:
            return outcomes + self._decode_fewer()
        logger.warning("a decode step failed and is repeated in parts: %s", failure.error)
        first, second = halves(self._running)
        self._park(second)
        outcomes += self._decode_surviving()
        self._park([key for key in first if key in self._running])
        for key in second:
            outcomes += self._unpark(key)
        return outcomes + (self._decode_surviving() if self._running else [])

    def _decode_fewer(self) -> Outcomes:
        """Out of memory: park the newest quarter of the rows, and decode the others."""
        num_rows = len(self._running)
        num_kept = num_rows - max(1, num_rows // 4)
        logger.warning("out of memory with %d answers; %d go on", num_rows, num_kept)
        self._limit.lower(num_kept)
        self._park(sorted(self._running, key=lambda key: self._running[key].number)[num_kept:])
        with contextlib.suppress(torch.OutOfMemoryError):
            for runner in self.runners.values():
                runner.shrink()
        return self._decode_surviving()

    def _decode_once(self, *, may_draft: bool) -> Outcomes:
        base = self.runners["base"]
        keys = [key for key, name in zip(base.keys, base.sources, strict=True) if name == "base"]
        active = {role: runner for role, runner in self.runners.items() if runner.keys}
        drafter = self._drafter_of(keys, may_draft=may_draft)
        if drafter is not None:
            own, policy = self._runner_of(drafter), self.draft_policy
            running = {key: self._running[key] for key in keys}
            active = {drafter if each is own else role: each for role, each in active.items()}
            # A new request must not wait for drafts, which may be rejected.
            limit = min(each.num_left for each in running.values()) - 1
            num_drafts = policy.num_drafts_together(
                [each.agreement for each in running.values()],
                limit=limit if may_draft and not self._pending else 0,
            )
            return speculate(
                running,
                active,
                drafter=drafter,
                policy=policy,
                num_drafts=num_drafts,
                workspace=self._workspace,
            )
        sequences = [self._running[key] for key in keys]
        index = {key: n for n, key in enumerate(keys)}
        outputs: dict[str, SourceLogits] = {}
        for runner in active.values():
            rows = [index[key] for key in runner.keys]
            before = runner.seconds
            logits = runner.decode([sequences[n].last for n in rows])
            spent_s = runner.seconds - before
            _share_time([sequences[n] for n in rows], spent_s, runner.sources)
            outputs |= _by_source(runner, logits, rows)
        outcomes = sample(sequences, outputs, workspace=self._workspace)
        return list(zip(keys, outcomes, strict=True))

    def _drafter_of(self, keys: list[Hashable], *, may_draft: bool) -> str | None:
        """The reward model that drafts for all running answers, if one may."""
        several = len(keys) > 1
        if len(keys) > self._max_draft_rows or (several and not may_draft):
            return None
        drafters = {self._running[key].drafter for key in keys}
        drafter = drafters.pop()
        if drafters or drafter is None:
            return None
        own = self._runner_of(drafter)
        if own is self.runners["base"] or {*own.sources} != {drafter}:
            return None
        return drafter if sorted(map(str, own.keys)) == sorted(map(str, keys)) else None

    def _park(self, keys: list[Hashable]) -> None:
        """Move running answers out of the models, into host memory."""
        rows: dict[str, dict[Hashable, list[ParkedRow]]] = {
            role: runner.park(keys) for role, runner in self.runners.items()
        }
        self._remove(set(keys))
        for key in keys:
            own = {role: found[key] for role, found in rows.items() if key in found}
            self._parked[key] = ParkedSequence(self._running.pop(key), own)

    def _unpark(self, key: Hashable) -> Outcomes:
        """Move an answer back into the models; an error if that fails for another reason than
        memory, for which it waits."""
        parked, checkpoint, failure = self._parked[key], Checkpoint.of(self.runners, []), None
        try:
            for role, rows in parked.rows.items():
                for row in rows:
                    self.runners[role].unpark(key, row)
        except Exception as error:
            failure = examine(error)
        if failure is None:
            self._running[key] = self._parked.pop(key).sequence
            return []
        checkpoint.restore()
        if failure.out_of_memory and self._running:
            self._limit.lower(len(self._running))
            return []
        del self._parked[key]
        return [self._blame(key, failure)]

    def _resume(self) -> Outcomes:
        """Move parked answers back, the oldest first, as far as memory allows."""
        outcomes: Outcomes = []
        for key in sorted(self._parked, key=lambda key: self._parked[key].sequence.number):
            if self._limit.room(len(self._running)):
                outcomes += self._unpark(key)
        return outcomes

    def _prefill(self, ready: Mapping[Hashable, PendingPrefill]) -> Outcomes:
        """Take in a chunk of a prompt, or several whole prompts; first outcomes.

        Args:
            ready: the pending requests to choose from.
        """
        began, limit = time.perf_counter(), self._pacer.num_tokens
        # Every fourth chunk is the oldest request's, so that no prompt is starved.
        keys = next_group(ready, oldest=self._num_chunks % 4 == 3, budget=limit)
        self._num_chunks += 1
        others = sharing(ready, keys)
        checkpoint, failure = Checkpoint.of(self.runners, []), None
        try:
            num_tokens, outcomes = self._prefill_once(keys, limit, others)
        except Exception as error:
            failure = examine(error)
        if failure is None:
            self._pacer.note_chunk(num_tokens, time.perf_counter() - began)
            return outcomes
        checkpoint.restore()
        return self._prefill_again([*keys, *others], failure)

    def _prefill_once(
        self, keys: list[Hashable], limit: int, others: Mapping[Hashable, int]
    ) -> tuple[int, Outcomes]:
        group = [self._pending[key] for key in keys]
        num_tokens = 0
        for source, first in group[0].prefills.items():
            if not first.chunks:
                continue
            runner = self._runner_of(source)
            first.shorten(limit)
            start, end = first.chunks[0]
            num_tokens = max(num_tokens, (end - start) * len(group))
            before = runner.seconds
            logits = runner.prefill([each.prefills[source] for each in group])
            if logits is not None:
                group[0].logits[source] = logits
            spent_s = runner.seconds - before
            _share_time([each.sequence for each in group], spent_s, [source] * len(group))
        return num_tokens, [] if group[0].num_left else self._start(keys, group, others)

    def _start(
        self,
        keys: list[Hashable],
        group: list[PendingPrefill],
        others: Mapping[Hashable, int],
    ) -> Outcomes:
        """Sample the first tokens of requests that were taken in together, and run them.

        Args:
            keys: of the requests.
            group: their prompts.
            others: requests with the prompt of one of these, by its place: their rows are copies.
        """
        sequences = [each.sequence for each in group]
        sequences += [self._pending[key].sequence for key in others]
        places = [*range(len(keys)), *others.values()]
        keys, group = [*keys, *others], [group[place] for place in places]
        rows = list(range(len(keys)))
        outputs = {
            source: SourceLogits(
                logits[places] if others else logits, rows, self._runner_of(source).vocabulary
            )
            for source, logits in group[0].logits.items()
        }
        outcomes = sample(sequences, outputs, workspace=self._workspace)
        going = [n for n in rows if not is_last(outcomes[n])]
        for source in group[0].prefills:
            added = [(keys[n], group[n].prefills[source]) for n in going]
            self._runner_of(source).add(
                added, source=source, num_expected=len(self._pending) - len(keys)
            )
        for key in keys:
            del self._pending[key]
        self._running |= {keys[n]: sequences[n] for n in going}
        return list(zip(keys, outcomes, strict=True))

    def _prefill_again(self, keys: list[Hashable], failure: Failure) -> Outcomes:
        """Begin the prompts of a failed step again, each alone; an error for one that was alone."""
        # With running answers, a prompt waits until some have ended.
        waits = failure.out_of_memory and bool(self._running)
        outcomes: Outcomes = []
        if failure.out_of_memory:
            outcomes += self._free_memory(besides=keys)
            self._pacer.note_out_of_memory()
            if waits:
                self._limit.lower(len(self._running))
        reason = "out of memory" if failure.out_of_memory else failure.error
        logger.warning("a prefill step failed and is repeated: %s", reason)
        max_failures = _MAX_PREFILL_OUT_OF_MEMORY if failure.out_of_memory else 1
        for key in keys:
            num_failures = self._pending[key].num_failures + (not waits)
            if len(keys) == 1 and num_failures > max_failures:
                del self._pending[key]
                outcomes.append(self._blame(key, failure))
            else:
                outcomes += self._begin_again(key, num_failures)
        return outcomes

    def _begin_again(self, key: Hashable, num_failures: int) -> Outcomes:
        """Begin the prompt of a pending request again; an error if that fails."""
        sequence = self._pending[key].sequence
        try:
            pending = self._begin(sequence.prepared, number=sequence.number)
        except Exception as error:
            del self._pending[key]
            return [self._blame(key, examine(error))]
        pending.num_failures = num_failures
        for prefill in pending.prefills.values():
            prefill.alone = num_failures > 0
        self._pending[key] = pending
        return []

    def _free_memory(self, *, besides: Container[Hashable] = ()) -> Outcomes:
        """Free what can be computed again: prompts that are partly taken in, all `besides` these,
        and the prefix cache. The errors of prompts that could not be begun again."""
        outcomes: Outcomes = []
        for key, pending in [*self._pending.items()]:
            if key not in besides and any(each.cache for each in pending.prefills.values()):
                outcomes += self._begin_again(key, pending.num_failures)
        self.prefix_cache.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outcomes

    def _blame(self, key: Hashable, failure: Failure) -> tuple[Hashable, Outcome]:
        """The outcome of the request that broke a step."""
        logger.error("a request failed; the others go on\n%s", failure.details)
        return key, failure.error


def _by_source(runner: ModelRunner, logits: Tensor, rows: list[int]) -> dict[str, SourceLogits]:
    """A runner's logits[R, V], and the numbers of its rows' sequences, by source."""
    names = dict.fromkeys(runner.sources)
    if len(names) == 1:
        return {name: SourceLogits(logits, rows, runner.vocabulary) for name in names}
    found = {}
    for name in names:
        places = [place for place, each in enumerate(runner.sources) if each == name]
        own = [rows[place] for place in places]
        found[name] = SourceLogits(logits[places], own, runner.vocabulary)
    return found


def _share_time(sequences: list[Sequence], seconds: float, sources: list[str]) -> None:
    """Add a model's time to the sequences of its rows: the base's, or that of others."""
    share_s = seconds / len(sequences)
    for sequence, source in zip(sequences, sources, strict=True):
        if source.partition("/")[0] == "base":
            sequence.base_s += share_s
        else:
            sequence.reward_s += share_s
