"""Counts what was read in each layout, and reports it in one line."""

from collections import Counter
from dataclasses import dataclass, field

from tita.data.layouts import Example


@dataclass(slots=True)
class LayoutCounts:
    """Number of pairs and questions by layout."""

    pairs: Counter[str] = field(default_factory=Counter)
    questions: Counter[str] = field(default_factory=Counter)
    num_without_image: int = 0
    """Number of questions without an image."""

    def add(self, example: Example) -> None:
        """Count one example."""
        (self.pairs if example.is_pair else self.questions)[example.layout] += 1
        self.num_without_image += not example.images

    def describe(self) -> str:
        """For example "RLHF-V layout, 5,733 pairs"; empty if nothing was read."""
        found = [(name, number, "pair") for name, number in self.pairs.items()]
        found += [(name, number, "question") for name, number in self.questions.items()]
        if not found:
            return ""
        text = "; ".join(
            f"{name} layout, {number:,} {kind}{'' if number == 1 else 's'}"
            for name, number, kind in found
        )
        if not self.num_without_image:
            return text
        if self.num_without_image == self.pairs.total() + self.questions.total():
            return f"{text}, no images"
        return f"{text}, {self.num_without_image:,} without an image"
