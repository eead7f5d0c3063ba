"""Answers of base and reward models under the conditions of an experiment."""

import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL.Image import Image

from tita.align import Engine, Request, Sampling
from tita.demo.methods import Condition
from tita.records import Question
from tita.storage import Store
from tita.terminal import Advance, progress
from tita.vlm.images import open_image
from tita.vlm.loading import VLM, Models

T = TypeVar("T")

_BATCH_SIZE = 128
_NUM_TIMED = 256
"""Questions whose answers are timed."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The answers of one condition."""

    answers: dict[str, str]
    """By question id."""
    seconds: float
    """In the engine, with the preparation of prompts: of the processor, or of a GPU."""


@dataclass(slots=True, kw_only=True)
class Questions:
    """The questions of one split, with their images."""

    items: Sequence[Question]
    folder: Path
    """The image folder."""
    max_new_tokens: int = 8
    _opened: list[Image] = field(init=False, default_factory=list)

    @property
    def opened(self) -> Sequence[Image]:
        """The image of each question."""
        if not self._opened:
            self._opened = [open_image(self.folder / str(each.image)) for each in self.items]
        return self._opened


@dataclass(slots=True, kw_only=True)
class Asker:
    """Asks a base model with reward models by name, each condition once; stores answers on request.

    A name that leads to another reward model later needs another asker.
    """

    base: VLM
    rewards: dict[str, VLM]
    advance: Advance
    """Called with the number of new answers, and the condition's name as `note`."""
    kept: Store | None = None
    """Where answers are kept, if at all."""
    key: str = ""
    """Of the answers that are kept: a digest of the data and of all models."""
    _engines: dict[tuple[str, bool], Engine] = field(default_factory=dict)
    _asked: dict[str, Asked] = field(default_factory=dict)
    """By split and condition, whose names differ between the demo's tables."""

    def ask(self, questions: Questions, condition: Condition, *, split: str) -> Asked:
        """Greedy answers (sampled ones for best of n), and the time that they took."""
        if self.kept is None:
            unnamed = dataclasses.asdict(dataclasses.replace(condition, name=""))
            known = json.dumps([split, unnamed], sort_keys=True)
            if known in self._asked:
                self.advance(len(questions.items), note=condition.name)
            else:
                self._asked[known] = ask(
                    self._engine(condition), questions, condition, advance=self.advance
                )
            return self._asked[known]
        described = json.dumps([self.key, split, dataclasses.asdict(condition)], sort_keys=True)
        key = f"answers/{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"
        if next(iter(self.kept.list(key)), None) is not None:
            self.advance(len(questions.items), note=condition.name)
            found = json.loads(self.kept.get(key))
            return Asked(found["answers"], found["seconds"])
        asked = ask(self._engine(condition), questions, condition, advance=self.advance)
        told = {"condition": condition.name, "split": split, **dataclasses.asdict(asked)}
        self.kept.put(key, json.dumps(told).encode())
        return asked

    def seconds(
        self, questions: Questions, conditions: Sequence[Condition], *, rounds: int
    ) -> list[float]:
        """The least time of each condition, over rounds of all of them in turn.

        Args:
            questions: the first 256 of them are answered.
            conditions: ways to answer.
            rounds: number of times that each condition is measured.
        """
        few = dataclasses.replace(questions, items=questions.items[:_NUM_TIMED])
        total = rounds * len(conditions) * len(few.items)
        with progress("measuring times", total=total) as advance:
            found = [
                [ask(self._engine(each), few, each, advance=advance).seconds for each in conditions]
                for _ in range(rounds)
            ]
        return [min(times) for times in zip(*found, strict=True)]

    def _engine(self, condition: Condition) -> Engine:
        key = (condition.reward, condition.alone)
        if key not in self._engines:
            reward = self.rewards[condition.reward] if condition.reward else None
            assert reward is not None or not condition.alone
            models = Models(reward) if condition.alone and reward else Models(self.base, reward)
            self._engines[key] = Engine(models)
        return self._engines[key]


def no_progress(amount: float = 1, *, note: str = "") -> None:
    """Shows nothing."""


def ask(engine: Engine, questions: Questions, condition: Condition, *, advance: Advance) -> Asked:
    """Answers by question id, and the time that they took.

    Args:
        engine: an engine with the models of the condition.
        questions: the questions.
        condition: how to answer.
        advance: called with the number of new answers.
    """
    others = _derange(questions.opened)
    requests = [
        Request(
            question=question.text,
            images=(image,),
            reward_images=(other,) if condition.shuffled else None,
            guidance=condition.guidance,
            sampling=Sampling(
                max_new_tokens=questions.max_new_tokens,
                temperature=float(condition.best_of > 1),
            ),
        )
        for question, image, other in zip(questions.items, questions.opened, others, strict=True)
    ]
    answers: dict[str, str] = {}
    # Other processes must not count. On a GPU, the processor only waits.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    for start in range(0, len(requests), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        outputs = (
            engine.best_of(requests[batch], condition.best_of)
            if condition.best_of > 1
            else engine.generate(requests[batch])
        )
        for question, output in zip(questions.items[batch], outputs, strict=True):
            answers[question.id] = output.text.strip()
        advance(len(outputs), note=condition.name)
    return Asked(answers, clock() - began)


def _derange(items: Sequence[T]) -> list[T]:
    """A permutation of the items that leaves none in its place (Sattolo 1986)."""
    order = list(items)
    generator = random.Random(0)
    for last in range(len(order) - 1, 0, -1):
        other = generator.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order
