"""The vLLM engine behind the interface `StepEngine`.

vLLM schedules, runs the models and samples. Text, stop strings and the end of an answer are decided
here, by the classes that the transformers engine has, so answers read the same.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from vllm import LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from tita.align.adapter_room import AdapterRoom
from tita.align.forms import OWN, REFERENCE
from tita.align.prompts import PreparedRequest, Preparer
from tita.align.requests import Outcome, is_last
from tita.align.sampling import NoNumbers
from tita.align.sequence import Detokenizer, SampledToken, Sequence
from tita.align.vocabulary import Vocabulary, end_tokens
from tita.engine.engine_options import ADAPTERS_PER_REQUEST
from tita.engine.interface import Capabilities, EngineCounts
from tita.engine.vllm_inputs import to_engine_input
from tita.errors import TitaError
from tita.vllm_plugin.families import Family
from tita.vllm_plugin.row_table import encode_request
from tita.vlm.adapters import AdapterFiles
from tita.vlm.inputs import image_token_id
from tita.vlm.loading import Models

CAPABILITIES = Capabilities(name="vllm", drafts=False, views=False, reports_seconds=False)

_EXIT_S = 12.0
"""Time for vLLM's processes to exit: its workers have 9 s, and are killed then."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """A request in vLLM."""

    key: Hashable
    sequence: Sequence
    num_tokens: int = 0
    """Tokens so far, a final end-of-text included."""


class VllmBatch:
    """Requests in a vLLM engine. Not thread-safe."""

    def __init__(
        self,
        engine: LLMEngine,
        models: Models,
        *,
        family: Family,
        preparer: Preparer,
        vocabularies: Mapping[str, Vocabulary],
        adapters: Mapping[str, LoRARequest] | None = None,
        drafts: bool = False,
        processes: Iterable[BaseProcess] = (),
    ) -> None:
        """Args:
        engine: vLLM's, which has loaded the models.
        models: outlines of the models.
        family: of all models.
        preparer: of their prompts.
        vocabularies: the maps of models whose tokens differ from the base's.
        adapters: LoRA adapters by role, if there are some.
        drafts: whether the engine drafts.
        processes: in which the engine runs, if not in this one.
        """
        self.preparer = preparer
        self._engine = engine
        self.models = models
        self._family = family
        self._vocabularies = vocabularies
        self._adapters = adapters or {}
        self._room = AdapterRoom(models, per_request=ADAPTERS_PER_REQUEST["vllm"])
        self._tokenizer = models.base.tokenizer
        self._ends = frozenset(end_tokens(models.base))
        self._image_token = image_token_id(models.base.model)
        self._running: dict[str, _Running] = {}
        self._ids: dict[Hashable, str] = {}
        self._finished: list[str] = []
        """Requests whose records in the workers are to be dropped."""
        self._num_admitted = 0
        self._num_prompts = self._num_cached_prompts = 0
        self._processes = tuple(processes)
        self.capabilities = dataclasses.replace(CAPABILITIES, drafts=drafts)
        if drafts:
            engine.collective_rpc("tita_follow_drafts")

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes run."""
        return all(process.is_alive() for process in self._processes)

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, key: Hashable, prepared: PreparedRequest) -> None:
        """Add a request; see `StepEngine`.

        Raises:
            TitaError: it asks for what this engine, or the loaded models, cannot do.
        """
        self._check(prepared)
        rewards = list(self.models.rewards)
        sources = self._room.without_extras(_sources_of(prepared, rewards), prepared)
        self._room.check(sources)
        sampling = prepared.request.sampling
        sequence = Sequence(
            number=self._num_admitted,
            prepared=prepared,
            tokenizer=self._tokenizer,
            ends=self._ends,
            detokenizer=Detokenizer(
                self._tokenizer, sampling.stops, min_tokens=sampling.min_new_tokens
            ),
        )
        request_id = str(self._num_admitted)
        self._num_admitted += 1
        engine_input = to_engine_input(
            prepared,
            family=self._family,
            image_token=self._image_token,
            vocabularies=self._vocabularies,
            adapters=[*self._adapters],
        )
        params = self._params(request_id, sequence, sources)
        adapter = next((self._adapters[name] for name in sources if name in self._adapters), None)
        if adapter is not None:
            # vLLM reads it when it runs the request, and ends if it cannot.
            self._adapter_files(adapter.lora_name).check_unchanged()
        try:
            self._engine.add_request(request_id, engine_input, params, lora_request=adapter)
        except ValueError as error:
            raise TitaError(f"vLLM refuses the request ({error})") from error
        self._running[request_id] = _Running(key=key, sequence=sequence)
        self._ids[key] = request_id

    def _adapter_files(self, role: str) -> AdapterFiles:
        pool = self.models.by_role()[role].adapters
        assert pool is not None
        return pool.files[role]

    def release(self, key: Hashable) -> None:
        request_id = self._ids.get(key)
        if request_id is not None:
            self._engine.abort_request([request_id])
            self._drop(request_id)

    def clear(self) -> None:
        running = [*self._running]
        for request_id in running:
            self._drop(request_id)
        self._engine.abort_request(running)

    def step(self) -> list[tuple[Hashable, Outcome]]:
        """Wait for the next tokens; see `StepEngine`."""
        if not self._running:
            return []
        outputs = [each for each in self._engine.step() if each.request_id in self._running]
        choices = self._fetch_choices(outputs)
        outcomes: list[tuple[Hashable, Outcome]] = []
        for output in outputs:
            outcomes += self._take(output, choices.get(output.request_id, []))
        return outcomes

    def counts(self) -> EngineCounts:
        values: dict[str, Any] = {
            metric.name: getattr(metric, "value", 0) for metric in self._engine.get_metrics()
        }
        return EngineCounts(
            num_sequences=len(self._running),
            kv_usage=float(values.get("vllm:kv_cache_usage_perc", 0)),
            num_preemptions=int(values.get("vllm:num_preemptions", 0)),
            num_drafts=int(values.get("vllm:spec_decode_num_drafts", 0)),
            num_draft_tokens=int(values.get("vllm:spec_decode_num_draft_tokens", 0)),
            num_accepted_tokens=int(values.get("vllm:spec_decode_num_accepted_tokens", 0)),
            prefix_queries={"base": self._num_prompts},
            prefix_hits={"base": self._num_cached_prompts},
        )

    def adapted_layers(self) -> set[str]:
        """Names of the layers that vLLM applies LoRA adapters to."""
        return set[str]().union(*self._engine.collective_rpc("tita_adapted_layers"))

    def close(self) -> None:
        self.clear()
        self._engine.engine_core.shutdown(timeout=_EXIT_S)

    def _check(self, prepared: PreparedRequest) -> None:
        """Refuse guidance that the combined model has no logits for."""
        form = prepared.request.guidance.form
        if prepared.request.score:
            raise TitaError(
                "best of n needs implicit rewards, which engine vllm does not report",
                remedy="leave out best_of, or use --engine transformers",
            )
        for term in prepared.terms:
            if term.source.view != OWN:
                raise TitaError(
                    f"form {form} runs the base model on {term.source.view.name}, "
                    "which engine vllm does not",
                    remedy="choose another form, or --engine transformers",
                )
            if term.against == REFERENCE and self.models.reference is None:
                raise TitaError(
                    f"form {form} without a reference model",
                    remedy="give the reward model as it was before DPO, or choose another form",
                )

    def _params(
        self, request_id: str, sequence: Sequence, sources: Iterable[str]
    ) -> SamplingParams:
        sampling = sequence.sampling
        ends = [] if sampling.ignore_end else sorted(self._ends)
        return SamplingParams(
            max_tokens=sequence.prepared.max_new_tokens,
            # The combined model samples, and leaves vLLM one possible token.
            temperature=0.0,
            # Which tokens end an answer is tita's rule, so vLLM's own is off.
            ignore_eos=True,
            stop_token_ids=list(dict.fromkeys((*ends, *sampling.stop_token_ids))),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=encode_request(
                request_id, sequence, list(self.models.rewards), sources=sources
            ),
        )

    def _fetch_choices(self, outputs: Items[RequestOutput]) -> dict[str, list[SampledToken | None]]:
        """What the sampler reported about new tokens; None where logits were no numbers."""
        spans = {}
        for output in outputs:
            if new := output.outputs[0].token_ids:
                start = self._running[output.request_id].num_tokens
                spans[output.request_id] = (start, start + len(new))
        if not spans:
            return {}
        finished, self._finished = self._finished, []
        found = {}
        # Only the ranks that compute logits have records; all of them have the same.
        for reports in self._engine.collective_rpc("tita_choices", args=(spans, finished)):
            for request_id, choices in reports.items():
                found[request_id] = [each and SampledToken(**each) for each in choices]
        return found

    def _take(
        self, output: RequestOutput, choices: Items[SampledToken | None]
    ) -> list[tuple[Hashable, Outcome]]:
        """New tokens of a request, with what the sampler reported about them."""
        running = self._running[output.request_id]
        completion = output.outputs[0]
        outcomes: list[tuple[Hashable, Outcome]] = []
        if completion.token_ids and not running.num_tokens:
            self._num_prompts += 1
            running.sequence.num_cached_tokens = output.num_cached_tokens or 0
            self._num_cached_prompts += bool(output.num_cached_tokens)
        for token, choice in zip(completion.token_ids, choices, strict=True):
            running.num_tokens += 1
            if choice is None:
                outcome: Outcome = NoNumbers(
                    "the model's logits are not numbers (NaN)",
                    remedy="check its weights and the image",
                )
            else:
                assert choice.token == token, "vLLM did not take the token that was chosen"
                outcome = running.sequence.append(choice)
            outcomes.append((running.key, outcome))
            if is_last(outcome):
                self._end(output)
                return outcomes
        if output.finished:
            # vLLM ended what the sequence does not call the end: a failure in its engine.
            self._drop(output.request_id)
            reason = completion.finish_reason
            outcomes.append((running.key, TitaError(f"vLLM ended the answer early ({reason})")))
        return outcomes

    def _end(self, output: RequestOutput) -> None:
        if not output.finished:
            self._engine.abort_request([output.request_id])
        self._drop(output.request_id)

    def _drop(self, request_id: str) -> None:
        running = self._running.pop(request_id)
        self._ids.pop(running.key, None)
        self._finished.append(request_id)


def _sources_of(prepared: PreparedRequest, rewards: Items[str]) -> frozenset[str]:
    """The models whose logits a request needs beside the base's.

    Args:
        prepared: the request and its terms.
        rewards: names of the reward models.
    """
    request, terms = prepared.request, prepared.terms
    sources = {each.source.name for each in terms}
    sources |= {each.against.name for each in terms if each.against is not None}
    if request.explain and request.guidance.uses_rewards:
        sources |= set(request.guidance.reward_weights(rewards) or rewards)
    return frozenset(sources - {"base"})
