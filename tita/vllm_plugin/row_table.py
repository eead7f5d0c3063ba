"""Which request each row of logits belongs to, and what was chosen for it.

The combined model reads the rows here when it computes logits. vLLM's model runner V1 tells a
logits processor of its batch (`logits_processors`), V2 a model state (`model_state`); if a reward
model drafts, V1's batch is read (`drafting`). One table per vLLM engine and process.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig

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
class RunningRequest:
    """One request in vLLM."""

    key: str
    sequence: TitaSequence
    sources: frozenset[str]
    """The models whose logits it needs beside the base's."""
    choices: dict[int, Choice] = field(default_factory=dict)
    """What was chosen, by position in the answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of logits, from which a token of a request is chosen."""

    request: RunningRequest
    num_tokens: int
    """Number of tokens in the answer."""
    drafts: Sequence[int] = ()
    """Tokens that are assumed after them."""

    @property
    def position(self) -> int:
        """Place in the answer of the token that is chosen."""
        return self.num_tokens + len(self.drafts)

    def catch_up(self) -> None:
        """Give the sequence the tokens that were chosen before the drafts."""
        ids = self.request.sequence.token_ids
        del ids[self.num_tokens :]
        for position in range(len(ids), self.num_tokens):
            choice = self.request.choices[position]
            ids.append(0 if choice is None else choice.token)


class RowSource(Protocol):
    """What vLLM tells of its batch; each model runner has its own."""

    def rows(self, number: int) -> list[Row | None]:
        """The rows of the logits that are computed now.

        None for requests of other clients, where nothing is sampled, and where vLLM tests itself.
        """


class RowTable:
    """The requests in vLLM's batch."""

    def __init__(self) -> None:
        self._by_key: dict[str, RunningRequest] = {}
        self._source: RowSource | None = None

    def follow(self, source: RowSource) -> None:
        """Read the rows there."""
        self._source = source

    def rows(self, number: int) -> list[Row | None]:
        """The rows of the logits that are computed now; see `RowSource`.

        Raises:
            RuntimeError: vLLM was started without what knows them.
        """
        if self._source is None:
            raise RuntimeError(
                "no request has guidance: vLLM's model runner V1 needs "
                "logits_processors=['tita.vllm_plugin.logits_processors:GuidanceRows']"
            )
        return self._source.rows(number)

    def enter(
        self, params: SamplingParams | None, prompt_ids: Sequence[int]
    ) -> RunningRequest | None:
        """The request that joins vLLM's batch; None if it is not of `encode_request`."""
        found = None if params is None else decode_request(params)
        if found is None:
            return None
        key, sequence, sources = found
        if known := self._by_key.get(key):
            # It was preempted, and comes back.
            return known
        sequence.prepared.inputs["base"] = {"input_ids": torch.tensor([prompt_ids])}
        request = RunningRequest(key=key, sequence=sequence, sources=sources)
        self._by_key[key] = request
        return request

    def choices(self, spans: Mapping[str, tuple[int, int]]) -> dict[str, list[Choice]]:
        """What was chosen for requests, from a position to before another each.

        After a draft that was wrong there are choices that do not belong to the answer, until the
        next step replaces them.
        """
        return {
            key: [self._by_key[key].choices[at] for at in range(*span)]
            for key, span in spans.items()
            if key in self._by_key and span[0] in self._by_key[key].choices
        }

    def forget(self, keys: Iterable[str]) -> None:
        """Drop the records of requests that are complete."""
        for key in keys:
            self._by_key.pop(key, None)


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


def check_params(params: SamplingParams) -> None:
    """Refuse a request that the combined model cannot answer.

    Raises:
        ValueError: with the reason.
    """
    decode_request(params)
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        # vLLM computes them with rows of logits that are no requests.
        raise ValueError("prompt_logprobs are not available with guidance")
