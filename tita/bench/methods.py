"""Methods that answers are compared by: the base, forms of guidance, best of n, and controls."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tita.align.forms import FORMS, Guidance
from tita.errors import TitaError

Control = Literal["", "other images", "before DPO"]
_BEST_OF = re.compile(r"best-of-(\d+)")
_TEMPERATURE = 1.0
"""Of best of n: its answers must differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to answer questions."""

    name: str
    """Unique in a report."""
    form: str = ""
    """Form of guidance; empty: the server's default."""
    weight: float = 0.0
    """Guidance weight of the only reward model, or of a form without one; 0 is the base alone."""
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Weights by reward model, instead of `weight`."""
    best_of: int = 1
    control: Control = ""
    """What is changed so that a gain cannot come from what DPO taught about the image."""
    explain: bool = False
    """Also ask which tokens guidance changed. It costs time and changes no answer."""

    @property
    def is_base(self) -> bool:
        """Whether it is the base model alone, to which the others are compared."""
        return not (self.weight or self.weights or self.best_of > 1)

    @property
    def slug(self) -> str:
        """The name in file names."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name).strip("_")

    def fields(self) -> dict[str, Any]:
        """Fields of a chat completions request to `tita serve`.

        Raises:
            TitaError: requests cannot express the control.
        """
        if self.control == "other images":
            raise TitaError(
                "a request has one image for base and reward model",
                where=self.name,
                remedy="run this control with --local-model",
            )
        if self.weights:
            fields: dict[str, Any] = {"guidance_weights": dict(self.weights)}
        else:
            fields = {"guidance_weight": self.weight}
        if self.form:
            fields["guidance_form"] = self.form
        if self.explain:
            fields["explain"] = True
        if self.best_of > 1:
            fields |= {"best_of": self.best_of, "temperature": _TEMPERATURE, "stream": False}
        return fields

    def temperature(self, usual: float) -> float:
        """The sampling temperature."""
        return _TEMPERATURE if self.best_of > 1 else usual

    def guidance(self) -> Guidance:
        """The guidance, for models in this process."""
        return Guidance.of(form=self.form or "tita", weight=self.weight, weights=self.weights)

    def record(self) -> dict[str, Any]:
        """The method as plain values for results files."""
        fields = {
            "method": self.name, "form": self.form, "control": self.control,
            "best_of": self.best_of if self.best_of > 1 else None,
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value}


BASE = Method(name="base")


def guided(weight: float, *, control: Control = "", reward: str = "") -> Method:
    """Guidance by the trained reward model, or a control of it.

    Args:
        reward: name of the reward model among several.
    """
    title = f"{control}, w = {weight:g}" if control else f"guided, w = {weight:g}"
    return Method(
        name=title,
        weight=0.0 if reward else weight,
        weights={reward: weight} if reward else {},
        control=control,
    )


def parse_methods(text: str, *, weights: list[float]) -> list[Method]:
    """The methods of `--methods`, the base first.

    `guided` is one method per weight; a form such as `vcd` or `m3id` has the settings of its paper
    or `vcd=0.5`; `best-of-4`; several reward models are `faithful=0.3+brief=0.1`.

    Raises:
        TitaError: there is no such method, or one is given twice.
    """
    methods = [BASE]
    for part in (part.strip() for part in text.split(",")):
        if part == BASE.name:
            continue
        methods += _parse(part, weights=[weight for weight in weights if weight])
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TitaError(f"the method {twice[0]!r} is given twice", where="--methods")
    return methods


def _parse(part: str, *, weights: list[float]) -> list[Method]:
    if part == "guided":
        return [guided(weight) for weight in weights]
    if found := _BEST_OF.fullmatch(part):
        if int(found[1]) < 2:
            raise TitaError("best of 1 is sampling", where="--methods", remedy="give best-of-4")
        return [Method(name=f"best of {found[1]}", best_of=int(found[1]))]
    values: dict[str, float] = {}
    for term in part.split("+"):
        name, _, value = term.partition("=")
        default = FORMS[name].weight if name in FORMS else None
        try:
            number = float(value) if value else default
        except ValueError:
            number = None
        if not name or number is None or not 0 <= number < float("inf") or name in values:
            raise TitaError(
                f"no method {part!r}",
                where="--methods",
                remedy=f"choose from base, guided, best-of-N, {', '.join(FORMS)}, "
                "or weights of reward models such as faithful=0.3+brief=0.1",
            )
        values[name] = number
    (first, weight), *others = values.items()
    if first == "guided" and not others:
        return [guided(weight)]
    if first in FORMS and not others:
        is_default = weight == FORMS[first].weight
        title = first if is_default else f"{first}, w = {weight:g}"
        return [Method(name=title, form=first, weight=weight)]
    return [Method(name=part, weights=values)]
