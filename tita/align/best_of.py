"""Best of n: several sampled answers to one prompt, and which of them the reward models prefer."""

import dataclasses
from collections.abc import Sequence

from tita.align.prompts import PreparedRequest
from tita.align.requests import TokenOutput
from tita.errors import TitaError


def check_best_of(number: int, *, temperature: float, rewards: Sequence[str]) -> None:
    """Check that n answers can differ, and be compared.

    Raises:
        TitaError: they cannot.
    """
    if number > 1 and not temperature:
        raise TitaError(
            f"best of {number} without temperature: all answers are the same",
            remedy="give a temperature, such as 0.7",
        )
    if number > 1 and not rewards:
        raise TitaError(f"best of {number} without a reward model", remedy="give a reward model")


def choices_of(prepared: PreparedRequest, number: int) -> list[PreparedRequest]:
    """The request with n seeds in a row. They share their inputs, so the prompt runs once."""
    request = prepared.request
    return [
        dataclasses.replace(
            prepared,
            request=dataclasses.replace(
                request,
                sampling=dataclasses.replace(request.sampling, seed=request.sampling.seed + offset),
            ),
        )
        for offset in range(number)
    ]


def score(outputs: Sequence[TokenOutput]) -> float:
    """The implicit reward of an answer, its end included (arXiv 2305.18290), without beta.

    The sum over its tokens of log p_reward - log p_reference, or - log p_base without a reference,
    in nats; with several reward models, their mean.
    """
    return sum(each.score or 0.0 for each in outputs)


def ranking(scores: Sequence[float]) -> list[int]:
    """The numbers of the answers, the best first; equal ones in order."""
    return sorted(range(len(scores)), key=lambda number: -scores[number])
