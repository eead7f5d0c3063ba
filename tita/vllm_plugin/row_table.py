"""Which request each row of logits belongs to, and what was chosen for it.

vLLM's runner (V1) tells a logits processor which request is at which place of its batch before each
forward pass; the rows of logits of that pass are in the order of the places. The combined model
reads the places here when it computes logits. One table per vLLM engine and process.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from tita.align.forms import Guidance
from tita.align.prompts import PreparedRequest
from tita.align.requests import Request, Sampling
from tita.align.sequence import Detokenizer, SampledToken
from tita.align.sequence import Sequence as TitaSequence

ARGUMENT = "tita"
"""Key in `SamplingParams.extra_args` of what the combined model has to know of a request."""
_KEYS = frozenset((
    "key", "rewards", "sources", "guidance", "sampling", "ends", "explain", "num_logprobs",
))  # fmt: skip

Choice = SampledToken | None
"""None if a model's logits were no numbers."""


@dataclass(slots=True, kw_only=True)
class Row:
    """One request in vLLM's batch."""

    key: str
    sequence: TitaSequence
    sources: frozenset[str]
    """The models whose logits it needs beside the base's."""
    output_ids: list[int]
    """vLLM's list of its tokens, of which only the length counts: with asynchronous scheduling the
    newest are placeholders."""
    choices: dict[int, Choice] = field(default_factory=dict)
    """What was chosen, by position in the answer."""

    def catch_up(self) -> None:
        """Give the sequence the tokens that were chosen before this step."""
        ids = self.sequence.token_ids
        del ids[len(self.output_ids) :]
        for position in range(len(ids), len(self.output_ids)):
            choice = self.choices[position]
            ids.append(0 if choice is None else choice.token)


class RowTable:
    """The requests at the places of vLLM's batch."""

    def __init__(self) -> None:
        self._rows: dict[int, Row | None] = {}
        self._by_key: dict[str, Row] = {}

    def rows(self, number: int) -> list[Row | None]:
        """The first rows; None for requests of other clients, and where vLLM only tests itself."""
        return [self._rows.get(place) for place in range(number)]

    def update(self, update: BatchUpdate) -> None:
        """Follow vLLM's batch: requests leave, join, and move, in this order."""
        for place in update.removed:
            self._rows.pop(place, None)
        for place, params, prompt_ids, output_ids in update.added:
            self._rows[place] = self._row(params, prompt_ids or [], output_ids)
        for one, other, direction in update.moved:
            first, second = self._rows.pop(one, None), self._rows.pop(other, None)
            if first is not None:
                self._rows[other] = first
            if direction == MoveDirectionality.SWAP and second is not None:
                self._rows[one] = second

    def choices(self, since: Mapping[str, int]) -> dict[str, list[Choice]]:
        """What was chosen for requests, from a position on each."""
        found = {}
        for key, start in since.items():
            if row := self._by_key.get(key):
                made = row.choices
                found[key] = [made[at] for at in range(start, len(made)) if at in made]
        return found

    def forget(self, keys: Iterable[str]) -> None:
        """Drop the records of requests that are complete."""
        for key in keys:
            self._by_key.pop(key, None)

    def _row(
        self, params: SamplingParams, prompt_ids: list[int], output_ids: list[int]
    ) -> Row | None:
        found = decode_request(params)
        if found is None:
            return None
        key, sequence, sources = found
        if known := self._by_key.get(key):
            # It was preempted, and comes back.
            known.output_ids = output_ids
            return known
        sequence.prepared.inputs["base"] = {"input_ids": torch.tensor([prompt_ids])}
        row = Row(key=key, sequence=sequence, sources=sources, output_ids=output_ids)
        self._by_key[key] = row
        return row


_tables: dict[str, RowTable] = {}


def table_of(config: VllmConfig) -> RowTable:
    """The table of a vLLM engine in this process."""
    return _tables.setdefault(config.instance_id, RowTable())


def encode_request(
    key: str, sequence: TitaSequence, rewards: Sequence[str], *, sources: Iterable[str]
) -> dict[str, Any]:
    """`extra_args` that tell the combined model about a request.

    Args:
        key: of the request, among those of this engine.
        sequence: the answer to be generated.
        rewards: names of the reward models.
        sources: the models whose logits it needs beside the base's.
    """
    request = sequence.prepared.request
    # Stop strings are looked for in the text, outside of vLLM; seeds may have any size.
    sampling = dataclasses.replace(request.sampling, stops=())
    return {
        ARGUMENT: {
            "key": key,
            "rewards": list(rewards),
            "sources": sorted(sources),
            "guidance": dataclasses.asdict(request.guidance),
            "sampling": dataclasses.asdict(sampling) | {"seed": str(sampling.seed)},
            "ends": sorted(sequence.ends),
            "explain": request.explain,
            "num_logprobs": request.num_logprobs,
        }
    }


def decode_request(params: SamplingParams) -> tuple[str, TitaSequence, frozenset[str]] | None:
    """Key and sequence of a request, and the models whose logits it needs beside the base's.

    None if it is not of `encode_request`. The sequence has no text.

    Raises:
        ValueError: its extra arguments are incomplete.
    """
    given = (params.extra_args or {}).get(ARGUMENT)
    if given is None:
        return None
    if not isinstance(given, dict) or given.keys() != _KEYS:
        raise ValueError(f"extra_args[{ARGUMENT!r}] needs {', '.join(sorted(_KEYS))}")
    sampling = dict(given["sampling"])
    sampling |= {
        "seed": int(sampling["seed"]),
        "stops": (),
        "stop_token_ids": tuple(sampling["stop_token_ids"]),
    }
    request = Request(
        guidance=Guidance(**given["guidance"]),
        sampling=Sampling(**sampling),
        explain=given["explain"],
        num_logprobs=given["num_logprobs"],
    )
    # A view of images is refused before, so it does not matter whether there are any.
    terms = request.guidance.terms(given["rewards"], has_images=True)
    prepared = PreparedRequest(
        request=request,
        terms=terms,
        inputs={},
        image_digests={},
        num_prompt_tokens=0,
        max_new_tokens=request.sampling.max_new_tokens,
    )
    sequence = TitaSequence(
        prepared=prepared,
        tokenizer=None,
        ends=frozenset(given["ends"]),
        detokenizer=Detokenizer(None),
    )
    return str(given["key"]), sequence, frozenset(given["sources"])


class GuidanceRows(LogitsProcessor):  # type: ignore[misc]
    """Keeps the table of rows up to date; it does not change logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that the combined model cannot answer.

        Raises:
            ValueError: with the reason.
        """
        decode_request(sampling_params)
        if sampling_params.prompt_logprobs is not None:
            # vLLM computes them with rows of logits that are no requests.
            raise ValueError("prompt_logprobs are not available with guidance")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._table = table_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is not None:
            self._table.update(batch_update)


class WorkerReports:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`)."""

    def tita_adapted_layers(self) -> list[str]:
        """Names of the layers of this process that vLLM applies LoRA adapters to."""
        model = self.get_model()  # type: ignore[attr-defined]
        return [name for name, each in model.named_modules() if isinstance(each, BaseLayerWithLoRA)]

    def tita_choices(
        self, since: Mapping[str, int], finished: Sequence[str]
    ) -> dict[str, list[dict[str, Any] | None]]:
        """What was chosen for requests, each as the fields of `SampledToken`.

        Args:
            since: keys of requests, each with the first position asked for.
            finished: keys of requests whose records are dropped.
        """
        table = table_of(self.vllm_config)  # type: ignore[attr-defined]
        table.forget(finished)
        return {
            key: [None if each is None else dataclasses.asdict(each) for each in choices]
            for key, choices in table.choices(since).items()
        }
