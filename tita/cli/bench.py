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


@app.command()
def prepare(
    suite: Annotated[str, typer.Argument(help="pope, textvqa, mme, mmbench, ...; or unpack.")],
    source: Annotated[
        Path, typer.Option(help="Folder of the set's published files; for unpack, questions.")
    ],
    out: Annotated[Path, typer.Option(help="Question file to write.")],
) -> None:
    """Turn an evaluation set's files, or questions with images inside, into a question file."""
    from tita.bench.suites import prepare as prepare_suite
    from tita.terminal import say

    say(f"wrote {prepare_suite(suite, source=source, out=out)} questions to {out}")


# Each of these adds its commands to `app`.
import tita.cli.bench_ask  # noqa: E402
import tita.cli.bench_report  # noqa: E402, F401
