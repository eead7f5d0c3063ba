"""What the models did since the last look, read off the stepper into the metrics."""

from prometheus_client import Counter

from tita.align.stepper import Stepper
from tita.serve.metrics import Metrics


class Readings:
    """Between a stepper, which counts for itself, and counters that only go up.

    What the stepper did before, as in a warm-up, nobody asked for: it does not count.
    """

    def __init__(self, stepper: Stepper, *, metrics: Metrics, max_batch: int) -> None:
        self._stepper = stepper
        self._metrics = metrics
        self._room = max_batch * stepper.base.context
        self._read = self._counts()

    def take(self) -> None:
        """Call it after a step, in the stepper's thread."""
        counts = self._counts()
        for counter, count in counts.items():
            counter.inc(count - self._read[counter])
        self._read = counts
        self._metrics.batch_size.set(len(self._stepper.base.rows))
        self._metrics.kv_usage.set(min(self._stepper.num_cells / self._room, 1.0))

    def _counts(self) -> dict[Counter, float]:
        stepper, metrics = self._stepper, self._metrics
        # The reference steers, too: as in the usage block, its time is the reward model's.
        steering = [lane for lane in (stepper.reward, stepper.reference) if lane is not None]
        return {
            metrics.base_s: stepper.base.seconds,
            metrics.reward_s: sum(lane.seconds for lane in steering),
            metrics.prefix_queries: stepper.prefixes.num_queries,
            metrics.prefix_hits: stepper.prefixes.num_hits,
            metrics.drafts: stepper.drafting.num_rounds,
            metrics.draft_tokens: stepper.drafting.num_drafted,
            metrics.accepted_tokens: stepper.drafting.num_accepted,
        }
