"""Options of several commands that name reward models and their weights."""

from collections.abc import Sequence
from typing import Annotated

import typer

from tita.errors import TitaError
from tita.records import MAX_WEIGHT, REWARD_NAME, check_reward_name, parse_weight

RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="[NAME=]MODEL",
        help="Reward model: a path, a hub name or a store tree; repeatable with names.",
    ),
]
WeightOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        metavar="[NAME=]WEIGHT",
        callback=lambda given: parse_weights(given) and given,
        help="Guidance weight, 0 is the base model alone; repeatable with reward models' names; "
        "default: the server's, or the form's.",
    ),
]
FormOption = Annotated[
    str, typer.Option(help="Guidance form: tita, genarm, dpo, vcd, tita_vcd, m3id, cfg.")
]
NoiseStepOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=999,
        help="Diffusion step of the distorted image, for --form vcd and tita_vcd; default: 500.",
    ),
]
ContrastOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_WEIGHT,
        help="Strength of the contrast beside reward models, for --form tita_vcd; default: 1.",
    ),
]
PlausibilityOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Minimum fraction of the base model's top-token probability; default: the form's.",
    ),
]


def parse_rewards(given: Sequence[str] | None) -> tuple[str | None, dict[str, str]]:
    """The reward model that was given without a name, and those with one.

    Raises:
        TitaError: two without a name, a name twice, or a name that is not possible.
    """
    alone: str | None = None
    named: dict[str, str] = {}
    for each in given or ():
        name, model = _split(each)
        if not model:
            raise TitaError(f"--reward {each} names no model", remedy="give NAME=MODEL")
        if name is None:
            if alone is not None:
                remedy = "give each a name: --reward faithful=... --reward brief=..."
                raise TitaError("several reward models without names", remedy=remedy)
            alone = model
            continue
        check_reward_name(name)
        if name in named:
            raise TitaError(f"two reward models named {name!r}", remedy="give each its own name")
        named[name] = model
    if alone is not None and named:
        raise TitaError(
            f"--reward {alone} has no name beside others", remedy="give NAME=MODEL for each"
        )
    return alone, named


def parse_weights(given: Sequence[str] | None) -> tuple[float | None, dict[str, float]]:
    """The guidance weight without a name, and weights by reward model.

    Raises:
        TitaError: a weight is no number in range, a name is given twice, or both are given.
    """
    alone: float | None = None
    named: dict[str, float] = {}
    for each in given or ():
        name, text = _split(each)
        weight = parse_weight(text, option="--weight")
        if name is None:
            alone = weight
        elif name in named:
            raise TitaError(f"two weights of {name}", where="--weight", remedy="leave one of them")
        else:
            named[name] = weight
    if alone is not None and (named or len(given or ()) > 1):
        raise TitaError("several weights without names", remedy="give NAME=WEIGHT for each")
    return alone, named


def _split(given: str) -> tuple[str | None, str]:
    """`NAME=VALUE`; a path may have an equals sign behind its first slash."""
    name, mark, value = given.partition("=")
    return (name, value) if mark and REWARD_NAME.fullmatch(name) else (None, given)
