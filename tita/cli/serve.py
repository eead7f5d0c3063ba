"""`tita serve` and `tita ask`: the inference server, and its small client."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app


@app.command()
def serve(
    base: Annotated[
        str, typer.Option(help="Base model: a tree in the store, a hub name, or a path.")
    ],
    reward: Annotated[
        str | None, typer.Option(help="Reward model, likewise; without one the base alone.")
    ] = None,
    weight: Annotated[
        float, typer.Option(min=0, help="Guidance weight of requests that name none.")
    ] = 0.3,
    form: Annotated[str, typer.Option(help="Guidance form: tita or genarm.")] = "tita",
    name: Annotated[str, typer.Option(help="The model's name in the API.")] = "tita",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; beyond it 429.")
    ] = 64,
    deadline_s: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.")] = 600.0,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers have after SIGTERM.")
    ] = 120.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest body of a request.")] = 64,
    max_images: Annotated[int, typer.Option(min=0, help="Images of one request.")] = 8,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help="Bearer keys, one a line; TITA_API_KEYS if not given."),
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(help="Host that images may be fetched from; repeatable. .x.org: all below."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Page elsewhere that may ask from a browser; repeatable, * for all."),
    ] = None,
    page: Annotated[bool, typer.Option(help="Show a page for people at /.")] = True,
    log_prompts: Annotated[bool, typer.Option(help="Write questions into the log.")] = False,
) -> None:
    """Serve aligned inference by OpenAI's API, LLaVA's worker protocol and a page."""
    from functools import partial

    from tita.serve import Limits, ServeOptions
    from tita.serve.keys import read_keys
    from tita.serve.loading import load
    from tita.serve.process import serve as run

    options = ServeOptions(
        name=name, weight=weight, form=form, page=page, log_prompts=log_prompts,
        api_keys=read_keys(api_keys_file), image_hosts=tuple(image_host or ()),
        allow_origins=tuple(allow_origin or ()),
        max_batch=max_batch, max_waiting=max_waiting, deadline_s=deadline_s, grace_s=grace_s,
        limits=Limits(max_body_bytes=max_body_mib * 2**20, max_images=max_images),
    )  # fmt: skip
    code = run(
        options,
        load_base=partial(load, base, what="base model", dtype=dtype),
        load_reward=partial(load, reward, what="reward model", dtype=dtype) if reward else None,
        host=host,
        port=port,
    )
    raise typer.Exit(code)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeatable.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The server's first model if not given.")
    ] = None,
    weight: Annotated[float | None, typer.Option(min=0, help="Guidance weight.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to write.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    api_key: Annotated[str | None, typer.Option(envvar="TITA_API_KEY", help="Bearer key.")] = None,
) -> None:
    """Ask a server; the answer streams, and tokens that alignment changed stand out."""
    from tita.serve.client import ask as run

    run(
        question, url=url, images=image or [], model=model, weight=weight,
        max_tokens=max_tokens, temperature=temperature, api_key=api_key,
    )  # fmt: skip
