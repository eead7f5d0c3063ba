"""Logits processors, which change no logits: vLLM's model runner V1 tells one of its batch.

V1 tells a logits processor before each forward pass which request is at which place of the batch;
the rows of logits of that pass are in the order of the places. V2 tells a model state
(`model_state`), and its logits processors come too late; the one here checks requests.
"""

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from tita.vllm_plugin.row_table import Row, RunningRequest, check_params, table_of

_Place = tuple[RunningRequest, list[int]]
"""A request and vLLM's list of its tokens, of which only the length counts: with asynchronous
scheduling the newest are placeholders."""


class _Check:
    """Checks requests, under either model runner."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that the combined model cannot answer.

        Raises:
            ValueError: with the reason.
        """
        check_params(sampling_params)


class GuidanceRows(_Check, LogitsProcessor):  # type: ignore[misc]
    """The rows of logits under model runner V1."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._table = table_of(vllm_config)
        self._table.follow(self)
        self._places: dict[int, _Place | None] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow vLLM's batch: requests leave, join, and move, in this order."""
        if batch_update is None:
            return
        places = self._places
        for place in batch_update.removed:
            places.pop(place, None)
        for place, params, prompt_ids, output_ids in batch_update.added:
            request = self._table.enter(params, prompt_ids or [])
            places[place] = None if request is None else (request, output_ids)
        for one, other, direction in batch_update.moved:
            first, second = places.pop(one, None), places.pop(other, None)
            if first is not None:
                places[other] = first
            if direction == MoveDirectionality.SWAP and second is not None:
                places[one] = second

    def rows(self, number: int) -> list[Row | None]:
        """See `RowSource`."""
        found = [self._places.get(place) for place in range(number)]
        return [None if each is None else Row(each[0], len(each[1])) for each in found]


class RequestCheck(_Check, LogitsProcessorV2):  # type: ignore[misc]
    """Nothing but the check, under model runner V2."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """False: logits stay as they are."""
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        return logits
