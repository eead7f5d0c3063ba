"""Drafting as often as can be, so that tests of it do not hang on the clock."""

from tita.align.sequence import Agreement
from tita.align.speculative import DraftPolicy


class Always(DraftPolicy):
    """Drafts so many tokens whether it pays or not."""

    def num_drafts(self, row: Agreement, *, limit: int) -> int:
        return min(limit, self.max_drafts)
