"""`tita infer`: one aligned answer, at once, in the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tita.cli.app import app
from tita.terminal import Output


@app.command()
def infer(
    base: Annotated[
        str, typer.Option(help="Base model: a path, a hub name or a tree in the store.")
    ],
    image: Annotated[Path, typer.Option(help="The image that is asked about.")],
    question: Annotated[str, typer.Option(help="The question.")],
    reward: Annotated[str | None, typer.Option(help="Reward model, named likewise.")] = None,
    weight: Annotated[float, typer.Option(help="Guidance weight; 0 is the base alone.")] = 0.3,
    compare: Annotated[
        bool, typer.Option("--compare", help="The base's answer beside it.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Every token's probabilities.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    output: Annotated[
        Output, typer.Option("-o", "--output", help="Form of the result.")
    ] = Output.TABLE,
) -> None:
    """Answer a question about an image, guided by the reward model."""
    from tita.align import Engine, Request, Sampling
    from tita.vlm import load_vlm, open_image

    opened = open_image(image)
    guided = 0.0 if reward is None else weight
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    weights = [0.0, guided] if compare else [guided]
    requests = [
        Request(question=question, images=(opened,), weight=one, sampling=sampling, explain=explain)
        for one in weights
    ]
    engine = Engine(
        load_vlm(base, dtype=dtype), None if reward is None else load_vlm(reward, dtype=dtype)
    )
    _show(weights, engine.generate(requests), explain=explain, output=output)


def _show(weights: list[float], answers: list[Any], *, explain: bool, output: Output) -> None:
    from dataclasses import asdict

    from tita.terminal import emit

    if output is not Output.TABLE:
        emit(
            [{"weight": w, **asdict(a)} for w, a in zip(weights, answers, strict=True)],
            output=output,
        )
        return
    for one, answer in zip(weights, answers, strict=True):
        name = "" if len(weights) == 1 else "base:    " if one == 0 else f"w = {one:g}: "
        print(f"{name}{answer.text}")
        if explain:
            emit([_token_row(token) for token in answer.tokens])


def _token_row(token: Any) -> dict[str, Any]:
    """Probabilities in percent; the mark says that the base alone would have said another token."""
    from math import exp

    def share(logprob: float | None) -> float | None:
        return None if logprob is None else round(100 * exp(logprob), 1)

    return {
        "token": token.text,
        "base %": share(token.base),
        "reward %": share(token.reward),
        "combined %": share(token.combined),
        "changed": "*" if token.changed else "",
    }
