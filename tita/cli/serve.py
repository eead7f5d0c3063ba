"""`tita serve` and `tita ask`: the inference server, and its small client."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app
from tita.cli.infer import AspectOption, Dtype, ImageAspect
from tita.records import DEFAULT_WEIGHT


class Quantization(StrEnum):
    """Bits that weights are held in."""

    EIGHT = "8bit"
    FOUR = "4bit"


@app.command()
def serve(
    base: Annotated[
        str, typer.Option(help="Base model: a tree in the store, a hub name, or a path.")
    ],
    reward: Annotated[
        str | None, typer.Option(help="Reward model, likewise; without one the base alone.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The reward model before DPO, likewise; for form dpo.")
    ] = None,
    weight: Annotated[
        float, typer.Option(min=0, max=100, help="Guidance weight of requests that name none.")
    ] = DEFAULT_WEIGHT,
    form: Annotated[
        str, typer.Option(help="Guidance form of these: tita, genarm or dpo.")
    ] = "tita",
    plausibility: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Theirs, too: least share of the base's best token's chance."
        ),
    ] = 0.0,
    max_drafts: Annotated[
        int,
        typer.Option(min=0, help="Tokens that the reward model drafts where that pays; 0: never."),
    ] = 8,
    name: Annotated[str, typer.Option(help="The model's name in the API.")] = "tita",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    dtype: Annotated[Dtype, typer.Option(help="Numbers of the weights.")] = Dtype.AUTO,
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads the base over all GPUs.")
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Of the base; needs bitsandbytes.")
    ] = None,
    image_aspect: AspectOption = ImageAspect.AUTO,
    pack: Annotated[
        bool | None,
        typer.Option(help="Lay float32 weights out as CPUs read them fastest; large ones are."),
    ] = None,
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
        typer.Option(help="Bearer keys, read again when it changes; TITA_API_KEYS if not given."),
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
    from tita.serve import Limits, ServeOptions
    from tita.serve.loading import LoadOptions
    from tita.serve.middleware import read_keys
    from tita.serve.server import serve as run

    sources = LoadOptions(
        base=base, reward=reward, reference=reference, form=form, dtype=dtype.value,
        device_map=device_map, image_aspect=image_aspect.value,
        quantization=None if quantization is None else quantization.value,
    )  # fmt: skip
    options = ServeOptions(
        name=name, weight=weight, form=form, plausibility=plausibility, max_drafts=max_drafts,
        pack=pack, page=page, log_prompts=log_prompts,
        keys=read_keys(api_keys_file), image_hosts=tuple(image_host or ()),
        allow_origins=tuple(allow_origin or ()),
        max_batch=max_batch, max_waiting=max_waiting, deadline_s=deadline_s, grace_s=grace_s,
        limits=Limits(max_body_bytes=max_body_mib * 2**20, max_images=max_images),
    )  # fmt: skip
    raise typer.Exit(run(options, load=sources.load, host=host, port=port))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image: a file, or a URL that the server may fetch; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The server's first model if not given.")
    ] = None,
    weight: Annotated[float | None, typer.Option(min=0, help="Guidance weight.")] = None,
    form: Annotated[str | None, typer.Option(help="Guidance form.")] = None,
    plausibility: Annotated[
        float | None, typer.Option(min=0, max=1, help="Plausibility bound.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to write.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="TITA_API_KEY", help="Bearer key.")] = None,
) -> None:
    """Ask a server; the answer streams, and tokens that alignment changed stand out."""
    from tita.serve.client import ask as run

    fields = {
        "model": model, "guidance_weight": weight, "guidance_form": form,
        "guidance_plausibility": plausibility, "max_tokens": max_tokens,
        "temperature": temperature, "seed": seed,
    }  # fmt: skip
    run(question, url=url, images=image or [], fields=fields, api_key=api_key)
