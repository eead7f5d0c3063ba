"""What the models did since the last look, read off the stepper into the metrics."""

from prometheus_client import Counter

from tita.align.stepper import Stepper
from tita.serve.metrics import Metrics


class Readings:
    """Between a stepper, which counts for itself, and counters that only go up."""

    def __init__(self, stepper: Stepper, *, metrics: Metrics, max_batch: int) -> None:
        self._stepper = stepper
        self._metrics = metrics
        self._room = max_batch * stepper.base.context
        self._read: dict[Counter, float] = {}

    def take(self) -> None:
        """Call it after a step, in the stepper's thread."""
        stepper, metrics = self._stepper, self._metrics
        # The reference steers, too: as in the usage block, its time is the reward model's.
        steering = [lane for lane in (stepper.reward, stepper.reference) if lane is not None]
        self._count(metrics.base_s, stepper.base.seconds)
        self._count(metrics.reward_s, sum(lane.seconds for lane in steering))
        self._count(metrics.prefix_queries, stepper.prefixes.num_queries)
        self._count(metrics.prefix_hits, stepper.prefixes.num_hits)
        self._count(metrics.draft_tokens, stepper.drafting.num_drafted)
        self._count(metrics.accepted_tokens, stepper.drafting.num_accepted)
        metrics.batch_size.set(len(stepper.base.rows))
        metrics.kv_usage.set(min(stepper.num_cells / self._room, 1.0))

    def _count(self, counter: Counter, now: float) -> None:
        counter.inc(now - self._read.get(counter, 0.0))
        self._read[counter] = now
