"""The methods that are compared: settings that validation chooses from, and their controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tita.align import Guidance
from tita.align.forms import FORMS, UNGUIDED

WEIGHTS = (0.1, 0.2, 0.3, 0.5)
"""Guidance weights that validation chooses from."""
CONTRASTS = (0.3, 1.0)
"""Strengths of contrast that validation chooses from; VCD's own is 1."""
NOISE_STEPS = (500, 999)
"""Diffusion steps that validation chooses from; VCD's own is 500."""
UNTRAINED = "before DPO"
"""Name of the reward model as it was before DPO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to answer the questions."""

    name: str
    guidance: Guidance = UNGUIDED
    reward: str = ""
    """The reward model that takes part, by name; empty for the base alone."""
    alone: bool = False
    """The reward model answers by itself."""
    shuffled: bool = False
    """The reward model sees images of other questions."""
    best_of: int = 1
    """Sample this number of answers at temperature 1; the reward model chooses."""

    def with_other_images(self) -> "Condition":
        """The control whose reward model sees images of other questions."""
        return replace(self, name=f"{self.name}, other images", shuffled=True)

    def without_dpo(self) -> "Condition":
        """The control with the reward model before DPO."""
        return replace(self, name=f"{self.name}, no DPO", reward=UNTRAINED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method, and its settings to choose from."""

    name: str
    passes: str
    """Forward passes per token, in those of the base; r is the size of the reward model by that of
    the base."""
    ways: tuple[Condition, ...]
    """One if a paper fixes it."""

    @property
    def baseline(self) -> str:
        """The method that it is without its reward model, with which its controls are compared."""
        return "vcd" if self.passes.startswith("2") else "base"

    @property
    def controls(self) -> dict[str, Callable[[Condition], Condition]]:
        """What makes a control of a condition, by the control's name."""
        if not self.ways[0].reward or self.ways[0].best_of > 1:
            return {}
        return {
            "other images": Condition.with_other_images,
            "no DPO": Condition.without_dpo,
        }

    def choose(self, score: Callable[[Condition], float]) -> Condition:
        """The way with the highest score on validation, the first of equals."""
        return max(self.ways, key=score)


BASE = Method(name="base", passes="1", ways=(Condition(name="base"),))


def contrastive_methods() -> list[Method]:
    """The methods that need no reward model."""
    published = Condition(name="vcd, as published", guidance=Guidance.of(form="vcd"))
    return [
        Method(name=published.name, passes="2", ways=(published,)),
        Method(
            name="vcd",
            passes="2",
            ways=tuple(
                Condition(
                    name=f"vcd, a = {contrast:g}, noise {step}",
                    guidance=Guidance.of(form="vcd", weight=contrast, noise_step=step),
                )
                for step in NOISE_STEPS
                for contrast in CONTRASTS
            ),
        ),
        Method(
            name="m3id",
            passes="2",
            ways=(Condition(name="m3id", guidance=Guidance.of(form="m3id")),),
        ),
    ]


def guided_method(reward: str, *, weights: Sequence[float] = WEIGHTS) -> Method:
    """Guidance by one reward model."""
    return Method(
        name=f"guided, {reward}",
        passes="1 + r",
        ways=tuple(
            Condition(
                name=f"guided, {reward}, w = {weight:g}",
                guidance=Guidance(weight=weight),
                reward=reward,
            )
            for weight in weights
        ),
    )


def joint_method(reward: str, *, noise_step: int) -> Method:
    """Contrast and one reward model together."""
    return Method(
        name=f"vcd and {reward}",
        passes="2 + r",
        ways=tuple(
            Condition(
                name=f"vcd and {reward}, a = {contrast:g}, w = {weight:g}",
                guidance=Guidance.of(
                    form="tita_vcd", weight=weight, contrast=contrast, noise_step=noise_step
                ),
                reward=reward,
            )
            for contrast in CONTRASTS
            for weight in WEIGHTS[:-1]
        ),
    )


def best_of_method(reward: str, *, number: int = 4) -> Method:
    """Best of n samples of the base by the implicit reward of one reward model."""
    name = f"best of {number}, {reward}"
    way = Condition(name=name, reward=reward, best_of=number)
    return Method(name=name, passes=f"{number} (1 + r)", ways=(way,))


def uses_noise(condition: Condition) -> bool:
    """Whether a condition contrasts with a distorted image."""
    return "noise_step" in FORMS[condition.guidance.form].settings
