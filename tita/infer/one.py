"""One question, answered at once in the terminal: streamed, explained, or beside the base."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import exp
from typing import Any

from tita.align import Answer, Token, TokenOutput
from tita.align.requests import UNGUIDED
from tita.errors import TitaError
from tita.infer.asking import Asking
from tita.terminal import Output, emit
from tita.vlm import Picture

_SHADES = ((2.0, "bold"), (0.5, ""), (0.1, "dim"))
"""How many nats a token was moved by, and how strongly that is shown."""


def answer_one(
    question: str, images: Sequence[Picture], asking: Asking, *, compare: bool, output: Output
) -> None:
    """Print the answer; with `compare` the base's beside it.

    Raises:
        TitaError: it has no answer.
    """
    request = asking.request(question, images)
    requests = [replace(request, guidance=UNGUIDED), request] if compare else [request]
    weights = [each.guidance.weight for each in requests]
    engine = asking.load()
    if output is Output.TABLE and not compare:
        outcomes = (outcome for _, outcome in engine.stream(requests))
        _stream(_said(outcomes), explain=asking.explain)
        return
    answers = engine.generate(requests)
    if output is not Output.TABLE:
        rows = zip(weights, answers, strict=True)
        emit([{"weight": weight, **asdict(answer)} for weight, answer in rows], output=output)
        return
    _side_by_side(weights, answers)
    if asking.explain:
        for weight, answer in zip(weights, answers, strict=True):
            print(f"\n{_name(weight)}:")
            emit([_row(token) for token in answer.tokens])


def _said(outcomes: Iterator[TokenOutput | TitaError]) -> Iterator[TokenOutput]:
    for outcome in outcomes:
        if isinstance(outcome, TitaError):
            raise outcome
        yield outcome


def _stream(said: Iterator[TokenOutput], *, explain: bool) -> None:
    if not explain:
        for each in said:
            print(each.text, end="", flush=True)
        print()
    elif sys.stdout.isatty():
        _coloured(said)
    else:
        emit([_row(each) for each in said])


def _coloured(said: Iterator[TokenOutput]) -> None:
    """The words as they come, each in the colour of what the reward model did to it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    num_changed = num_tokens = 0
    for each in said:
        console.print(Text(each.text, style=style_of(each)), end="")
        num_changed += each.changed
        num_tokens += each.counted
    console.print()
    legend = Text("\n")
    legend.append("lifted", style="green").append(" or ").append("held down", style="red")
    legend.append(" by the reward model; ").append("underlined", style="underline")
    legend.append(f": the base alone would have said otherwise ({num_changed} of {num_tokens})")
    Console(stderr=True, highlight=False).print(legend)


def style_of(said: TokenOutput) -> str:
    """A rich style: green where guidance made the token likelier, red where less so."""
    assert said.logprob is not None
    assert said.base is not None
    moved = said.logprob - said.base
    shade = next((f"{name} " for least, name in _SHADES if abs(moved) >= least), None)
    colour = "" if shade is None else shade + ("green" if moved > 0 else "red")
    return f"{colour} underline".strip() if said.changed else colour.strip()


def _row(token: TokenOutput | Token) -> dict[str, Any]:
    """Probabilities in percent; the mark says that the base alone would have said another token."""
    if isinstance(token, TokenOutput):
        text, combined = token.token, token.logprob
    else:
        text, combined = token.text, token.combined
    moved = None if combined is None or token.base is None else round(combined - token.base, 2)
    return {
        "token": text,
        "base %": _share(token.base),
        "reward %": _share(token.reward),
        "combined %": _share(combined),
        "moved": moved,
        "changed": "*" if token.changed else "",
    }


def _share(logprob: float | None) -> float | None:
    return None if logprob is None else round(100 * exp(logprob), 1)


def _name(weight: float) -> str:
    return "base" if weight == 0 else f"w = {weight:g}"


def _side_by_side(weights: Sequence[float], answers: Sequence[Answer]) -> None:
    """Two columns on a terminal; else a line each, for scripts."""
    if not sys.stdout.isatty():
        for weight, answer in zip(weights, answers, strict=True):
            name = f"{_name(weight)}:".ljust(9 if weight == 0 else 0)
            print(f"{name} {answer.text}" if weight else f"{name}{answer.text}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, expand=True)
    for weight in weights:
        table.add_column(_name(weight), ratio=1, overflow="fold")
    table.add_row(*(answer.text for answer in answers))
    Console(markup=False, highlight=False).print(table)
