"""DPO's losses by TRL's names: which there are, presets, and which settings fit together.

The formulas and their sources are in TRL: https://huggingface.co/docs/trl/dpo_trainer#loss-functions
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from tita.errors import TitaError

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""TRL's `loss_type`."""
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""TRL's `f_divergence_type` (arXiv 2309.16240)."""

PRESETS: Mapping[str, Mapping[str, float]] = {
    # Mixed preference optimisation, as InternVL2.5-MPO was trained (arXiv 2411.10442, section 4.1).
    "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
}

_SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""Losses that read `label_smoothing`; TRL ignores it in the others."""
_WITH_DIVERGENCE = {
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"),
}
"""Losses that TRL defines for other divergences than the reverse Kullback-Leibler divergence."""

_recipe_error = partial(TitaError, where="recipe of train-dpo")


def parse_losses(value: Any) -> Any:
    """A `loss` of a recipe as a mapping of names to weights; other types unchanged.

    A name or a preset, a list of names and of `{name: weight}`, or a mapping.
    """
    if isinstance(value, str):
        value = PRESETS.get(value, [value])
    if not isinstance(value, list | tuple):
        return value
    found: dict[str, Any] = {}
    for item in value:
        parts = item if isinstance(item, Mapping) else {item: 1.0}
        for name, weight in parts.items():
            if name in PRESETS:
                raise _recipe_error(f"loss: {name!r} is a preset", remedy=f"--set loss={name}")
            if name in found:
                raise _recipe_error(f"loss: {name!r} twice", remedy="name each loss once")
            found[name] = weight
    return found


def check_losses(
    losses: Mapping[str, float],
    *,
    nll_weight: float,
    label_smoothing: float,
    divergence: Divergence,
    has_alpha: bool,
) -> None:
    """Check that the losses and their settings fit together.

    Args:
        losses: weight by name.
        nll_weight: of `sft`, in its short form.
        label_smoothing: probability that a preference is wrong.
        divergence: from the reference model.
        has_alpha: whether a coefficient of the alpha divergence is given.

    Raises:
        TitaError: a setting would have no effect, or TRL does not define it for a loss.
    """
    if not any(losses.values()):
        raise _recipe_error("loss: no loss has a weight above 0", remedy="--set loss=sigmoid")
    if unknown := sorted(losses.keys() - set(LOSSES)):
        names = ", ".join((*LOSSES, *PRESETS))
        raise _recipe_error(f"loss: unknown {unknown[0]!r}", remedy=f"choose from {names}")
    named = ", ".join(losses)
    if nll_weight and "sft" in losses:
        raise _recipe_error("`nll_weight` and `sft` in `loss` are the same", remedy="keep one")
    if label_smoothing and not _SMOOTHED & losses.keys():
        raise _recipe_error(
            f"`label_smoothing` has no effect on {named}",
            remedy=f"use one of the losses {', '.join(sorted(_SMOOTHED))}",
        )
    if not label_smoothing and "exo_pair" in losses:
        raise _recipe_error("`exo_pair` needs smoothing", remedy="--set label_smoothing=0.001")
    if divergence != "reverse_kl" and (others := losses.keys() - _WITH_DIVERGENCE):
        raise _recipe_error(
            f"{', '.join(sorted(others))} is not defined for f_divergence={divergence}",
            remedy="--set f_divergence=reverse_kl",
        )
    if has_alpha and divergence != "alpha_divergence":
        raise _recipe_error(
            f"`f_alpha_divergence_coef` has no effect on f_divergence={divergence}",
            remedy="--set f_divergence=alpha_divergence",
        )
