"""One question, answered in the terminal: streamed, explained, or beside the base model."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import exp
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tita.align.forms import UNGUIDED, Guidance
from tita.align.requests import Answer, Outcome, Token, TokenOutput
from tita.engine.interface import AnswerEngine
from tita.engine.start import start_answer_engine
from tita.errors import TitaError
from tita.infer.options import InferOptions
from tita.terminal import Output, emit
from tita.vlm.images import Picture
from tita.vlm.loading import VLM, load_vlm

_SHADES = ((2.0, "bold"), (0.5, ""), (0.1, "dim"))
"""Minimum change of a token's log-probability in nats, and its style."""


def answer_one(
    question: str,
    images: Sequence[Picture],
    options: InferOptions,
    *,
    compare: bool,
    output: Output,
) -> None:
    """Print the answer; with `compare`, the base model's beside it.

    Raises:
        TitaError: the models cannot be loaded, or the question has no answer.
    """
    request = options.request(question, images)
    requests = [replace(request, guidance=UNGUIDED), request] if compare else [request]
    guidances = [each.guidance for each in requests]
    engine = load_engine(options)
    if output is Output.TABLE and not compare:
        tokens = _tokens(outcome for _, outcome in engine.stream(requests))
        if not options.explain:
            for each in tokens:
                print(each.text, end="", flush=True)
            print()
        elif sys.stdout.isatty():
            _print_coloured(tokens)
        else:
            emit([_row(each) for each in tokens])
        return
    answers = engine.generate(requests)
    if output is not Output.TABLE:
        rows = zip(guidances, answers, strict=True)
        emit([{**_weights(each), **asdict(answer)} for each, answer in rows], output=output)
        return
    names = [_name(each) for each in guidances]
    _print_side_by_side(names, answers)
    if options.explain:
        for name, answer in zip(names, answers, strict=True):
            print(f"\n{name}:")
            emit([_row(token) for token in answer.tokens])


def load_engine(options: InferOptions) -> AnswerEngine:
    """Load the models, and start the engine that runs them.

    Raises:
        TitaError: one of them cannot be loaded, they are not of one family, or the engine does not
            support them.
    """

    def load(role: str, name: str) -> VLM:
        device_map = options.device_map if role == "base" else None
        return load_vlm(
            name,
            dtype=options.dtype,
            image_aspect=options.image_aspect,
            device_map=device_map,
        )

    return start_answer_engine(
        {"base": options.base, **options.all_rewards, "reference": options.reference},
        load,
        engine=options.engine,
        image_aspect=options.image_aspect,
        vllm_options=options.vllm,
    )


def _tokens(outcomes: Iterator[Outcome]) -> Iterator[TokenOutput]:
    for outcome in outcomes:
        if isinstance(outcome, TitaError):
            raise outcome
        yield outcome


def _print_coloured(tokens: Iterator[TokenOutput]) -> None:
    """Print the text as it comes, coloured by the effect of the reward model on each token."""
    console = Console(highlight=False, soft_wrap=True)
    num_changed = num_tokens = 0
    for each in tokens:
        console.print(Text(each.text, style=style_of(each)), end="")
        num_changed += each.changed
        num_tokens += each.counted
    console.print()
    legend = Text("\n")
    legend.append("raised", style="green").append(" or ").append("lowered", style="red")
    legend.append(" by the reward model; ").append("underlined", style="underline")
    legend.append(f": the base alone would have chosen another ({num_changed} of {num_tokens})")
    Console(stderr=True, highlight=False).print(legend)


def style_of(output: TokenOutput) -> str:
    """A rich style: green if guidance made the token more likely, red if less."""
    assert output.logprob is not None
    assert output.base is not None
    moved = output.logprob - output.base
    shade = next((f"{name} " for least, name in _SHADES if abs(moved) >= least), None)
    colour = "" if shade is None else shade + ("green" if moved > 0 else "red")
    return f"{colour} underline".strip() if output.changed else colour.strip()


def _row(token: TokenOutput | Token) -> dict[str, Any]:
    """Probabilities in percent; `*` marks a token that the base alone would not have chosen."""
    if isinstance(token, TokenOutput):
        text, combined = token.token, token.logprob
    else:
        text, combined = token.text, token.combined
    moved = None if combined is None or token.base is None else round(combined - token.base, 2)
    return {
        "token": text,
        **{f"{name} %": _share(logprob) for name, logprob in token.terms},
        "combined %": _share(combined),
        "moved": moved,
        "changed": "*" if token.changed else "",
    }


def _share(logprob: float | None) -> float | None:
    return None if logprob is None else round(100 * exp(logprob), 1)


def _weights(guidance: Guidance) -> dict[str, Any]:
    """The weight, or those of several reward models by name."""
    by_name = dict(guidance.weights)
    return {"weights": by_name} if by_name else {"weight": guidance.weight}


def _name(guidance: Guidance) -> str:
    if not guidance.active:
        return "base"
    by_name = ", ".join(f"{name} = {weight:g}" for name, weight in guidance.weights.items())
    return by_name or f"w = {guidance.weight:g}"


def _print_side_by_side(names: Sequence[str], answers: Sequence[Answer]) -> None:
    """Two columns in a terminal, else one line per answer."""
    if not sys.stdout.isatty():
        width = max(len(f"{name}:") for name in names)
        for name, answer in zip(names, answers, strict=True):
            print(f"{name}:".ljust(width), answer.text)
        return
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(answer.text for answer in answers))
    Console(markup=False, highlight=False).print(table)
