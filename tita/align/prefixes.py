"""What is kept of prompts: the KV up to their last image, for the next question about it."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tita.align.cache import KeysAndValues


class PrefixCache:
    """KV of prompts up to their last image; what was asked least recently goes first."""

    def __init__(self, max_bytes: int) -> None:
        """Args:
        max_bytes: room for them; with none, nothing is kept.
        """
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, KeysAndValues] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_queries = 0

    def get(self, key: Hashable) -> "KeysAndValues | None":
        self.num_queries += 1
        if key not in self._kept:
            return None
        self.num_hits += 1
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: Hashable, columns: "KeysAndValues") -> None:
        size = _size(columns)
        if size > self.max_bytes or key in self._kept:
            return
        self._kept[key] = columns
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _size(self._kept.popitem(last=False)[1])


def _size(columns: "KeysAndValues") -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in columns for tensor in pair)
