"""A draft policy that always drafts, so that tests do not depend on timing."""

from collections.abc import Sequence

from tita.align.sequence import Agreement
from tita.align.speculative import DraftPolicy


class Always(DraftPolicy):
    """Drafts `max_drafts` tokens whether it pays or not."""

    def num_drafts(self, agreement: Agreement, *, limit: int) -> int:
        return min(limit, self.max_drafts)

    def num_drafts_together(self, agreements: Sequence[Agreement], *, limit: int) -> int:
        return min(limit, self.max_drafts)
