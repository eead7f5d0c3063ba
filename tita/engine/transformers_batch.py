"""The transformers engine behind the interface `StepEngine`."""

from collections.abc import Hashable

from tita.align.batch import Outcomes
from tita.align.engine import Engine
from tita.align.prompts import PreparedRequest, Preparer
from tita.engine.interface import Capabilities, EngineCounts

CAPABILITIES = Capabilities(name="transformers", drafts=True, views=True, reports_seconds=True)


class TransformersBatch:
    """A batch in this process; methods as of `StepEngine`."""

    capabilities = CAPABILITIES
    alive = True

    def __init__(self, engine: Engine, *, max_batch: int) -> None:
        """Args:
        engine: whose models run.
        max_batch: the number of sequences at which the KV cache counts as full.
        """
        self.preparer: Preparer = engine.preparer
        self.batch = engine.new_batch()
        self._num_cells = max_batch * engine.models.base.context_length

    def __len__(self) -> int:
        return len(self.batch)

    def admit(self, key: Hashable, prepared: PreparedRequest) -> None:
        self.batch.admit(key, prepared)

    def release(self, key: Hashable) -> None:
        self.batch.release(key)

    def clear(self) -> None:
        self.batch.clear()

    def step(self) -> Outcomes:
        return self.batch.step()

    def counts(self) -> EngineCounts:
        runners, drafts = self.batch.runners, self.batch.draft_policy
        base = runners["base"]
        return EngineCounts(
            num_sequences=len(base.keys),
            kv_usage=min(base.num_cells / self._num_cells, 1.0),
            base_s=base.seconds,
            # As in the usage block, the reference model's time is part of the reward model's.
            reward_s=sum(runner.seconds for role, runner in runners.items() if role != "base"),
            num_drafts=drafts.num_rounds,
            num_draft_tokens=drafts.num_drafted,
            num_accepted_tokens=drafts.num_accepted,
            prefix_queries={role: each.num_prefix_queries for role, each in runners.items()},
            prefix_hits={role: each.num_prefix_hits for role, each in runners.items()},
        )

    def close(self) -> None:
        self.batch.clear()
