"""Guidance of a request as data, and the forms: recipes that expand it to a sum of terms.

Every form is log p = log p_base + sum of c (log p_source - log p_against), before softmax. A
source is a model and the view that it has of the request. Imports no torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tita.errors import TitaError
from tita.records import DEFAULT_WEIGHT

NUM_NOISE_STEPS = 1000
"""Steps of the diffusion that distorts images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a model sees a request."""

    image: Literal["own", "distorted", "none"] = "own"
    noise_step: int = 0
    """Of a distorted image."""
    text: str = ""
    """Text that is added before the question."""

    @property
    def name(self) -> str:
        """Empty for the request as it is."""
        image = {"own": "", "distorted": "distorted", "none": "no-image"}[self.image]
        return "+".join(part for part in (image, "text" if self.text else "") if part)

    def without_images(self) -> "View":
        """The same view of a request that has no images."""
        return View(text=self.text)


OWN = View()
"""The request as it is."""


@dataclass(frozen=True, slots=True)
class Source:
    """One distribution over the next token: a model, and its view of the request."""

    model: str
    view: View = OWN

    @property
    def name(self) -> str:
        """`base`, `reward`, `base/no-image`: unique within a request."""
        return f"{self.model}/{self.view.name}" if self.view.name else self.model


BASE, REFERENCE = Source("base"), Source("reference")


@dataclass(frozen=True, slots=True)
class Term:
    """c (log p_source - log p_against), a part of the sum."""

    source: Source
    coefficient: float | Callable[[int], float]
    """c, or a function of the token's position in the answer, which begins with 1."""
    against: Source | None = None
    """None: c log p_source."""

    def at(self, position: int) -> float:
        """The coefficient at a position, from 1."""
        c = self.coefficient
        return c(position) if callable(c) else c


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How one request is steered.

    Raises:
        TitaError: a value is out of range, or there is no such form.
    """

    weight: float = DEFAULT_WEIGHT
    """Guidance weight, of the only reward model or of a form without one; 0 is the base model
    alone."""
    form: str = "tita"
    """One of `FORMS`."""
    plausibility: float = 0.0
    """Minimum fraction of the base model's top-token probability that a token must have; 0 is no
    bound (alpha of contrastive decoding, arXiv 2210.15097)."""
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Weights of several reward models by name, instead of `weight`; 0 for those not named."""
    noise_step: int = 500
    """Diffusion step of the distorted image (forms `vcd`, `tita_vcd`): 0 is the image itself, 999
    almost noise."""
    contrast: float = 1.0
    """Strength of the contrast beside reward models (form `tita_vcd`)."""
    text: str = ""
    """Text that one view adds before the question (form `cfg`)."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            *others, last = FORMS
            remedy = f"choose {', '.join(others)} or {last}"
            raise TitaError(f"no guidance form {self.form!r}", remedy=remedy)
        for weight in (self.weight, *self.weights.values()):
            if not 0 <= weight < float("inf"):
                raise TitaError(f"guidance weight is {weight}", remedy="give 0 or more")
        if not 0 <= self.contrast < float("inf"):
            raise TitaError(f"contrast is {self.contrast}", remedy="give 0 or more")
        if not 0 <= self.plausibility <= 1:
            raise TitaError(f"plausibility is {self.plausibility}", remedy="give 0 to 1")
        if not 0 <= self.noise_step < NUM_NOISE_STEPS:
            remedy = f"give 0 to {NUM_NOISE_STEPS - 1}"
            raise TitaError(f"noise_step is {self.noise_step}", remedy=remedy)
        if self.weights and not FORMS[self.form].uses_rewards:
            raise TitaError(f"form {self.form} uses no reward model", remedy="give one weight")
        if self.text and self.form != "cfg":
            raise TitaError(f"form {self.form} adds no text", remedy="choose form cfg")

    @classmethod
    def of(
        cls,
        *,
        form: str = "tita",
        weight: float | None = None,
        plausibility: float | None = None,
        weights: Mapping[str, float] | None = None,
        noise_step: int | None = None,
        contrast: float | None = None,
        text: str | None = None,
    ) -> "Guidance":
        """Guidance with the form's own defaults for what is None.

        Raises:
            TitaError: as of the class, or a value has no effect on the form.
        """
        known = FORMS.get(form) or FORMS["tita"]  # the class reports an unknown one
        given: dict[str, Any] = {"noise_step": noise_step, "contrast": contrast}
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            users = [each for each, one in FORMS.items() if name in one.settings]
            if form in FORMS and form not in users:
                remedy = f"choose form {' or '.join(users)}, or leave it out"
                raise TitaError(f"{name} has no effect on form {form}", remedy=remedy)
        return cls(
            form=form,
            weight=known.weight if weight is None else weight,
            plausibility=known.plausibility if plausibility is None else plausibility,
            weights=weights or {},
            text=text or "",
            **given,
        )

    @property
    def active(self) -> bool:
        """Whether anything steers; without, every form is the base model alone."""
        return any(self.weights.values()) if self.weights else self.weight > 0

    def among(self, rewards: Sequence[str]) -> "Guidance":
        """The guidance with one weight divided equally between reward models by name.

        Together they are then as strong as one. Without reward models, a form that uses them is the
        base alone.
        """
        if not self.uses_rewards:
            return self
        if not rewards:
            return UNGUIDED
        if len(rewards) == 1 or self.weights or not self.weight:
            return self
        each = self.weight / len(rewards)
        return dataclasses.replace(self, weights=dict.fromkeys(rewards, each))

    @property
    def uses_rewards(self) -> bool:
        """Whether the form is about reward models."""
        return FORMS[self.form].uses_rewards

    def reward_weights(self, rewards: Sequence[str]) -> dict[str, float]:
        """The weights by reward model; empty for forms without.

        Args:
            rewards: the names of those that are loaded.

        Raises:
            TitaError: there is no such reward model, or it is unclear which one is meant.
        """
        if not self.uses_rewards:
            return {}
        names = ", ".join(rewards)
        for name in self.weights:
            if name not in rewards:
                remedy = f"choose from {names}" if names else "give one, or weight 0"
                raise TitaError(f"no reward model {name!r}", remedy=remedy)
        if self.weights or not self.active:
            return dict(self.weights)
        if not rewards:
            raise TitaError("guidance without a reward model", remedy="give one, or weight 0")
        if len(rewards) > 1:
            raise TitaError(
                f"one weight for {len(rewards)} reward models", remedy=f"give weights of {names}"
            )
        return {rewards[0]: self.weight}

    def terms(self, rewards: Sequence[str], *, has_images: bool) -> tuple[Term, ...]:
        """What is added to log p_base; empty if the base decides alone.

        Args:
            rewards: the names of the reward models.
            has_images: without, a view of the images is the request as it is.

        Raises:
            TitaError: as of `reward_weights`.
        """
        if not self.active:
            return ()
        terms = FORMS[self.form].expand(self, self.reward_weights(rewards))
        if not has_images:
            terms = [dataclasses.replace(term, source=_without_images(term)) for term in terms]
        return tuple(each for each in terms if each.coefficient != 0 and each.source != BASE)


def _without_images(term: Term) -> Source:
    return Source(term.source.model, term.source.view.without_images())


@dataclass(frozen=True, slots=True)
class Form:
    """A recipe."""

    expand: Callable[[Guidance, Mapping[str, float]], list[Term]]
    """From guidance, and weights by reward model, to terms."""
    uses_rewards: bool
    needs_reference: bool
    weight: float
    """Default weight."""
    plausibility: float
    """Default plausibility bound."""
    settings: tuple[str, ...] = ()
    """Further fields of the guidance that it reads."""


FORMS: dict[str, Form] = {}
"""By name."""


def _form(
    *,
    weight: float = DEFAULT_WEIGHT,
    plausibility: float = 0.0,
    uses_rewards: bool = False,
    needs_reference: bool = False,
    settings: tuple[str, ...] = (),
) -> Callable[
    [Callable[[Guidance, Mapping[str, float]], list[Term]]],
    Callable[[Guidance, Mapping[str, float]], list[Term]],
]:
    """Register a function as the form of its name, with the defaults of its paper."""

    def register(
        expand: Callable[[Guidance, Mapping[str, float]], list[Term]],
    ) -> Callable[[Guidance, Mapping[str, float]], list[Term]]:
        FORMS[expand.__name__] = Form(
            expand, uses_rewards, needs_reference, weight, plausibility, settings
        )
        return expand

    return register


@_form(uses_rewards=True)
def tita(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """log p_base + sum of w (log p_reward - log p_base) (TITA, arXiv 2510.21794)."""
    return [Term(Source(name), weight, against=BASE) for name, weight in rewards.items()]


@_form(uses_rewards=True)
def genarm(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """log p_base + sum of w log p_reward (GenARM, arXiv 2410.08193)."""
    return [Term(Source(name), weight) for name, weight in rewards.items()]


@_form(uses_rewards=True, needs_reference=True)
def dpo(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """log p_base + sum of w log(p_reward / p_reference).

    The ratio times beta is the reward that DPO fits (arXiv 2305.18290); to add it to another
    model's log-probabilities is emulated fine-tuning (arXiv 2310.12962), or proxy-tuning (arXiv
    2401.08565).
    """
    return [Term(Source(name), weight, against=REFERENCE) for name, weight in rewards.items()]


@_form(weight=1.0, plausibility=0.1, settings=("noise_step",))
def vcd(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """(1 + w) log p_base - w log p_base(distorted image) (VCD, arXiv 2311.16922)."""
    return _against_distorted(guidance, guidance.weight)


@_form(uses_rewards=True, weight=0.1, plausibility=0.1, settings=("noise_step", "contrast"))
def tita_vcd(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """(1 - w) ((1 + a) log p_base - a log p_base(distorted image)) + w log p_reward.

    `tita` with the sum of `vcd` in the place of the base; a is the contrast. The plausibility bound
    is that of the base, as in `vcd`. From w = 1 on there is no contrast.
    """
    share = max(0.0, 1 - sum(rewards.values()))
    return tita(guidance, rewards) + _against_distorted(guidance, share * guidance.contrast)


def _against_distorted(guidance: Guidance, strength: float) -> list[Term]:
    """`strength` times (log p_base - log p_base(distorted image))."""
    if not guidance.noise_step:
        return []
    distorted = View(image="distorted", noise_step=guidance.noise_step)
    return [Term(Source("base", distorted), -strength, against=BASE)]


@_form(weight=0.02, plausibility=0.1)
def m3id(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """log p_base + (e^(w t) - 1) (log p_base - log p_base(no image)) at position t.

    M3ID (arXiv 2403.14003): (1 - g) / g with g = e^(-w t), the rate at which the image's influence
    fades. The paper leaves out the contrast where the base is certain; the plausibility bound, by
    which its comparisons replace that rule, has the same purpose.
    """

    def coefficient(position: int) -> float:
        return -math.expm1(min(guidance.weight * position, _MAX_EXPONENT))

    return [Term(Source("base", View(image="none")), coefficient, against=BASE)]


_MAX_EXPONENT = 60.0
"""Beyond, a coefficient times a log-probability leaves the range of float32."""


@_form(weight=1.5)
def cfg(guidance: Guidance, rewards: Mapping[str, float]) -> list[Term]:
    """w log p_base(condition) + (1 - w) log p_base(no condition) (arXiv 2306.17806).

    With an added text, the text is the condition, and the request as it is has none: the sum of
    MARINE (arXiv 2402.08680). Else the image is the condition, and weight 1 is the base alone.
    """
    if guidance.text:
        added = Source("base", View(text=guidance.text))
        return [Term(added, guidance.weight, against=BASE)]
    return [Term(Source("base", View(image="none")), 1 - guidance.weight, against=BASE)]


REFERENCE_FORMS = frozenset(name for name, form in FORMS.items() if form.needs_reference)
"""Forms that need the reference model: the reward model before DPO."""

VIEW_FORMS = frozenset(
    name
    for name, form in FORMS.items()
    if any(
        term.source.view != OWN
        for term in form.expand(Guidance(weight=0.5, form=name), {"reward": 0.5})
    )
)
"""Forms that run the base model a second time, on another view of the request."""

UNGUIDED = Guidance(weight=0.0)
"""The base model alone."""
