"""Drafting by a reward model, under vLLM's model runner V1.

vLLM loads the reward model a second time, as its draft model, and verifies drafts by greedy
rejection sampling: a draft is accepted if it is the one token that the combined model leaves
possible. So answers do not depend on drafts, sampled ones neither.

With drafts, V1 takes no logits processors, which would be told of its batch; it is read here.

Legend: T tokens of a step, N of them of images, D width of the reward model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tita.vllm_plugin.row_table import Row, RowTable, RunningRequest


@dataclass(frozen=True, slots=True)
class ImageEmbeddings:
    """The images' part of what the reward model reads in a step."""

    places: Tensor
    """[N], among the step's tokens; on the CPU."""
    embeddings: Tensor
    """[N, D]."""


class NoRequests:
    """The rows of logits until vLLM has started: it tests itself."""

    def rows(self, number: int) -> list[Row | None]:
        """See `RowSource`."""
        return [None] * number


class DraftedBatch:
    """V1's batch of a step, with the tokens that were drafted for each request."""

    def __init__(self, runner: Any, table: RowTable) -> None:
        """Args:
        runner: vLLM's model runner.
        table: of its engine.
        """
        self._runner = runner
        self._table = table
        self._known: dict[str, RunningRequest | None] = {}
        """By vLLM's id, those of the last step."""

    def rows(self, number: int) -> list[Row | None]:
        """See `RowSource`.

        Raises:
            RuntimeError: the logits are of something else than the batch.
        """
        batch, states = self._runner.input_batch, self._runner.requests
        self._known = {each: self._request(each, states[each]) for each in batch.req_ids}
        rows: list[Row | None] = []
        for (req_id, request), drafts in zip(
            self._known.items(), batch.spec_token_ids, strict=False
        ):
            length = len(states[req_id].output_token_ids)
            rows += [
                None if request is None else Row(request, length, drafts[:count])
                for count in range(len(drafts) + 1)
            ]
        if rows and len(rows) != number:
            raise RuntimeError(f"{number} rows of logits for {len(rows)} tokens to be chosen")
        return rows or [None] * number

    def put_images(self, embedded: Tensor, images: ImageEmbeddings | None) -> None:
        """Put images into what the draft model reads first in a step.

        These are the tokens that the combined model has read, and one more of each request.

        Args:
            embedded: [T + number of requests, D]; modified.
            images: of the combined model.
        """
        if images is None:
            return
        ends = self._runner.query_start_loc.np[1 : self._runner.input_batch.num_reqs + 1]
        before = torch.searchsorted(torch.from_numpy(ends).long(), images.places, right=True)
        places = (images.places + before).to(embedded.device)
        embedded[places] = images.embeddings.to(embedded.dtype)

    def _request(self, req_id: str, state: Any) -> RunningRequest | None:
        if req_id in self._known:
            return self._known[req_id]
        return self._table.enter(state.sampling_params, state.prompt_token_ids or [])
