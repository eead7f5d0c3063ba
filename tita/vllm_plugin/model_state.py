"""The rows of logits under vLLM's model runner V2, which tells a model's state of its batch."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from tita.vllm_plugin.row_table import Row, RunningRequest, table_of


class GuidedModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's state of a decoder model, which also knows the rows of the next logits.

    Without drafts, every request of a batch has one row, in the order of the batch.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._table = table_of(vllm_config)
        self._table.follow(self)
        self._running: dict[str, tuple[RunningRequest, int]] = {}
        """By vLLM's id, with the number of tokens of the prompt."""
        self._rows: list[Row | None] = []

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request joins the batch, or comes back after it was preempted."""
        super().add_request(req_index, new_req_data)
        request = self._table.enter(
            new_req_data.sampling_params, new_req_data.prompt_token_ids or []
        )
        if request is not None:
            self._running[new_req_data.req_id] = (request, new_req_data.prompt_len)

    def remove_request(self, req_id: str) -> None:
        """A request leaves the batch."""
        super().remove_request(req_id)
        self._running.pop(req_id, None)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Called before every forward pass."""
        # Exact, because nothing is drafted.
        lengths = input_batch.seq_lens_cpu_upper_bound.tolist()
        self._rows = [
            self._row(*each)
            for each in zip(
                input_batch.req_ids,
                lengths[: input_batch.num_reqs],
                input_batch.prefill_len_np.tolist(),
                strict=True,
            )
        ]
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return inputs

    def rows(self, number: int) -> list[Row | None]:
        """See `RowSource`.

        Raises:
            RuntimeError: the logits are of something else than the batch.
        """
        if len(self._rows) == number:
            return self._rows
        if any(self._rows):
            raise RuntimeError(f"{number} rows of logits for {len(self._rows)} requests")
        return [None] * number

    def _row(self, req_id: str, length: int, prefill_length: int) -> Row | None:
        """The row of a request of which this number of tokens has been read after this pass."""
        found = self._running.get(req_id)
        # vLLM drops what it samples before it has read all tokens that are known.
        if found is None or length < prefill_length:
            return None
        request, prompt_length = found
        return Row(request, length - prompt_length)
