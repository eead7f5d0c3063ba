"""Held-out pairs: split by image, checked for leaks, and what they say about the reward model.

The figure that says whether the model looks is the *image effect*: the accuracy on the held-out
pairs under their own images minus the accuracy under other pairs' images. A model that has learned
from the texts alone which answer is usually chosen prefers it under any image; its effect is 0.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from tita.errors import TitaError
from tita.records import Pair, ValidationFigures

_LOG_PREFIX = "eval_held_out/"
_RECIPE = "recipe of train-dpo"
_Z = 1.96
"""Normal quantile of a 95 % interval."""


def split_by_image(
    pairs: Sequence[Pair], *, share: float, digests: Mapping[str, str], seed: int
) -> list[bool]:
    """Whether each pair is held out.

    Pictures are held out in an order that depends on the seed and their content alone, until they
    have `share` of the pairs, and at least two of them.

    Raises:
        TitaError: there are fewer than three pictures.
    """
    keys = np.empty(len(pairs), dtype=np.uint64)
    for number, pair in enumerate(pairs):
        # Sorted, the pictures are in the order in which they are held out.
        order = hashlib.sha256(f"{seed}/{digests[pair.image]}".encode()).digest()
        keys[number] = int.from_bytes(order[:8])
    pictures, num_pairs = np.unique(keys, return_counts=True)
    if len(pictures) < 3:
        raise TitaError(
            f"validation={share:g} needs pairs of three images or more, and there are "
            f"{len(pictures)}",
            where=_RECIPE,
            remedy="add pairs with other images, or remove `validation`",
        )
    before = np.cumsum(num_pairs) - num_pairs
    num_held = max(2, int(np.searchsorted(before, share * len(pairs))))
    is_held: list[bool] = (keys <= pictures[min(num_held, len(pictures) - 1) - 1]).tolist()
    return is_held


def check_leaks(
    trained: Iterable[str],
    held_out: Sequence[str],
    *,
    digests: Mapping[str, str],
    where: str,
    is_split: bool = False,
) -> None:
    """Check that no picture is both trained on and held out, under whatever names.

    Args:
        trained: names of the images of pairs, of their negatives and of the warm-up.
        held_out: names of the images of the validation pairs.
        digests: SHA-256 of each image by name.
        where: the validation data, for the error.
        is_split: whether the pairs were split by their own images, so that only a negative image
            can be in both.

    Raises:
        TitaError: a picture is in both.
    """
    held = {digests[name] for name in held_out}
    names: dict[str, str] = {}
    for name in trained:
        if (digest := digests[name]) in held:
            names[digest] = max(name, names.get(digest, name))
    leaked = sorted({name for name in held_out if digests[name] in names})
    if leaked:
        twin = names[digests[leaked[0]]]
        alias = "" if twin == leaked[0] else f", in training as {twin!r}"
        remedy = (
            "they are the `rejected_image` of other pairs: give pairs about other images as "
            "`validation`, or --set image_preference.negative=other --set "
            "'ignore_columns=[rejected_image]'"
            if is_split
            else "remove their pairs from one of the two, or --set validation=0.05, which splits "
            "by image"
        )
        raise TitaError(
            f"{len(leaked)} of {len(set(held_out))} images are also trained on, such as "
            f"{leaked[0]!r}{alias}",
            where=where,
            remedy=remedy,
        )


def summarise(
    own: torch.Tensor, other: torch.Tensor, *, pictures: Sequence[str], step: int
) -> ValidationFigures:
    """The figures of one evaluation.

    Args:
        own: margins of the pairs under their own images, `[N]`: beta times the difference of the
            log-ratios, chosen minus rejected.
        other: the same under other pairs' images.
        pictures: the picture of each pair.
        step: of the training.
    """
    difference = (own > 0).double() - (other > 0).double()
    effect, low, high = _interval(difference.tolist(), groups=pictures)
    return ValidationFigures(
        step=step,
        loss=-logsigmoid(own.double()).mean().item(),
        margin=own.double().mean().item(),
        accuracy=(own > 0).double().mean().item(),
        other_loss=-logsigmoid(other.double()).mean().item(),
        other_margin=other.double().mean().item(),
        other_accuracy=(other > 0).double().mean().item(),
        image_effect=effect,
        image_effect_low=low,
        image_effect_high=high,
    )


def _interval(values: Sequence[float], *, groups: Sequence[str]) -> tuple[float, float, float]:
    """Mean of differences of -1, 0 or 1 and its 95 % interval, where a group is one observation.

    Agresti and Min's interval for paired proportions (Statistics in Medicine 24, 2005), which adds
    one observation of 1 and one of -1 and so never has width 0, with the variance of the sums of
    groups (Liang and Zeger, Biometrika 73, 1986): questions about one picture are not independent.
    """
    mean, number = sum(values) / len(values), len(values) + 2
    centre = sum(values) / number
    sums = {"+": 1 - centre, "-": -1 - centre}
    for value, group in zip(values, groups, strict=True):
        sums[f"={group}"] = sums.get(f"={group}", 0.0) + value - centre
    width = _Z * math.sqrt(sum(part**2 for part in sums.values())) / number
    return mean, max(-1.0, centre - width), min(1.0, centre + width)


def validation_logs(figures: ValidationFigures) -> dict[str, float]:
    """The figures as the trainer logs them; `read_logs` reads them."""
    return {_LOG_PREFIX + name: float(value) for name, value in asdict(figures).items()}


def read_logs(logs: Mapping[str, float]) -> ValidationFigures | None:
    """The figures in a trainer's logs; None if there are none."""
    found: dict[str, Any] = {
        name.removeprefix(_LOG_PREFIX): value
        for name, value in logs.items()
        if name.startswith(_LOG_PREFIX)
    }
    return ValidationFigures(**found | {"step": int(found["step"])}) if found else None


def sight_warning(figures: ValidationFigures) -> str | None:
    """A warning if the figures do not show that the model uses its images; else None."""
    if figures.image_effect_low > 0:
        return None
    verdict = (
        "prefers as well without seeing"
        if figures.image_effect <= 0
        else "may not look at its images, or too few pairs are held out to tell"
    )
    return (
        f"the reward model {verdict}: {figures.accuracy:.0%} of the held-out pairs under their own "
        f"images, {figures.other_accuracy:.0%} under others (difference "
        f"{figures.image_effect:+.3f}, 95 % interval {figures.image_effect_low:+.3f} to "
        f"{figures.image_effect_high:+.3f})"
    )
