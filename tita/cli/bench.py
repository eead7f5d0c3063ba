"""`tita-bench`: benchmark any OpenAI-compatible vision-language endpoint, or a model here."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import new_app

app = new_app("Ask vision-language models questions; say how good, how fast and how dear they are.")


@app.callback()
def _root() -> None:
    from tita.terminal import configure_logging

    configure_logging()


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Question file to write; images go beside it.")],
    num: Annotated[int, typer.Option(help="Number of questions.")] = 24,
    seed: Annotated[int, typer.Option(help="Other seeds give other questions.")] = 0,
) -> None:
    """Write sample questions, with references, and the real images they are about."""
    from tita.bench.sample import write_sample
    from tita.terminal import say

    items = write_sample(out, num=num, seed=seed)
    num_images = sum(len(item.images) for item in items)
    say(f"wrote {len(items)} questions to {out} and {num_images} images beside it")
