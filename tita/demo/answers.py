"""Asking the models: the same questions under every condition that the demo compares."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tita.records import Question
from tita.terminal import Advance

if TYPE_CHECKING:
    from tita.align import Engine, Request

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way of answering."""

    name: str
    weight: float
    model: Literal["trained", "untrained", "reward alone"] = "trained"
    """Which reward model guides, or that it answers by itself."""
    shuffled: bool = False
    """Whether the reward model sees the images of other questions."""


def conditions(weights: Sequence[float]) -> list[Condition]:
    """All conditions of the test split; weight 0 is the base alone, whatever guides it."""
    guided = [weight for weight in weights if weight > 0]
    return [
        Condition(name="base", weight=0.0),
        *(Condition(name=f"guided, w = {weight:g}", weight=weight) for weight in guided),
        Condition(name="reward model alone", weight=1.0, model="reward alone"),
        *(
            Condition(name=f"other images, w = {weight:g}", weight=weight, shuffled=True)
            for weight in guided
        ),
        *(
            Condition(name=f"no DPO, w = {weight:g}", weight=weight, model="untrained")
            for weight in guided
        ),
    ]


def ask(
    engine: "Engine",
    questions: Sequence[Question],
    *,
    images: Path,
    condition: Condition,
    advance: Advance,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, str]:
    """Greedy answers by question id.

    Args:
        engine: holds the models that `condition.model` names.
        questions: each with an image below `images`.
        condition: how to answer.
        advance: called with the number of answers that came.
        batch_size: questions in one batch.
        seed: of the order in which images are shuffled.
    """
    requests = _requests(questions, images=images, condition=condition, seed=seed)
    answers: dict[str, str] = {}
    for start in range(0, len(questions), batch_size):
        batch = slice(start, start + batch_size)
        for question, answer in zip(
            questions[batch], engine.generate(requests[batch]), strict=True
        ):
            answers[question.id] = answer.text.strip()
        advance(len(questions[batch]), note=condition.name)
    return answers


def _requests(
    questions: Sequence[Question], *, images: Path, condition: Condition, seed: int
) -> "list[Request]":
    from tita.align import Request, Sampling
    from tita.vlm import open_image

    opened = [open_image(images / str(question.image)) for question in questions]
    others = _deranged(opened, seed=seed) if condition.shuffled else None
    return [
        Request(
            question=question.text,
            images=(opened[index],),
            reward_images=None if others is None else (others[index],),
            weight=condition.weight,
            sampling=Sampling(max_new_tokens=8),
        )
        for index, question in enumerate(questions)
    ]


def _deranged(items: Sequence[T], *, seed: int) -> list[T]:
    """The items in an order in which none stands where it stood (Sattolo 1986)."""
    order = list(items)
    generator = random.Random(seed)
    for last in range(len(order) - 1, 0, -1):
        other = generator.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order
