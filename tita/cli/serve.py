"""`tita serve` and `tita ask`: the inference server and a small client."""

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app, read_question
from tita.cli.engine_arguments import (
    EnforceEager,
    EngineChoice,
    EngineOption,
    LeaderAddress,
    LeaderPort,
    MaxModelLen,
    MemoryShare,
    NodeRank,
    NumNodes,
    PipelineParallel,
    TensorParallel,
    vllm_options,
)
from tita.cli.guidance_options import (
    ContrastOption,
    FormOption,
    NoiseStepOption,
    PlausibilityOption,
    RewardOption,
    WeightOption,
    parse_rewards,
    parse_weights,
)
from tita.cli.infer import AspectOption, Dtype, ImageAspect
from tita.imports import without_garbage_collection
from tita.terminal import say


class Quantization(StrEnum):
    """Quantization of weights."""

    EIGHT = "8bit"
    FOUR = "4bit"


@app.command()
def serve(
    base: Annotated[
        str, typer.Option(help="Base model: a tree in the store, a hub name, or a path.")
    ],
    reward: RewardOption = None,
    reference: Annotated[
        str | None, typer.Option(help="Reward model before DPO; required for form dpo.")
    ] = None,
    weight: WeightOption = None,
    form: FormOption = "tita",
    plausibility: PlausibilityOption = None,
    noise_step: NoiseStepOption = None,
    contrast: ContrastOption = None,
    max_drafts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Maximum number of draft tokens per step; 0 disables drafting. Default: 8, with "
            "vllm 0.",
        ),
    ] = None,
    max_draft_rows: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of running requests for which drafts are made."),
    ] = 1,
    max_adapters: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of LoRA adapters in memory; others are loaded on demand."
        ),
    ] = 16,
    prefix_cache_mib: Annotated[
        int,
        typer.Option(
            min=0, help="Size of the cache of images' keys and values in MiB; 0 disables it."
        ),
    ] = 256,
    name: Annotated[str, typer.Option(help="Model name in the API.")] = "tita",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free port.")] = 8000,
    dtype: Annotated[Dtype, typer.Option(help="Weight dtype.")] = Dtype.AUTO,
    device_map: Annotated[
        str | None, typer.Option(help="Device map of the base model; auto uses all GPUs.")
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Quantize the base model; requires bitsandbytes.")
    ] = None,
    image_aspect: AspectOption = ImageAspect.AUTO,
    pack: Annotated[
        bool | None,
        typer.Option(help="Pack float32 weights for faster CPU kernels; default: large models."),
    ] = None,
    engine: EngineOption = EngineChoice.TRANSFORMERS,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = 0,
    master_addr: LeaderAddress = "",
    master_port: LeaderPort = 29501,
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    enforce_eager: EnforceEager = False,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of running requests; default: 16, with vllm 256."),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Maximum number of waiting requests; beyond it, status 429.")
    ] = 64,
    deadline_s: Annotated[
        float, typer.Option(min=0.1, help="Maximum duration of a request in seconds.")
    ] = 600.0,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds for running requests to finish after SIGTERM.")
    ] = 120.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Maximum request body in MiB.")] = 64,
    max_bodies_mib: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum bodies of requests in progress together in MiB; else 429."
        ),
    ] = 256,
    header_timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Maximum seconds for the headers of a request.")
    ] = 10.0,
    max_images: Annotated[int, typer.Option(min=0, help="Maximum images per request.")] = 8,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help="File of API keys, reloaded when it changes; default: TITA_API_KEYS."),
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(help="Host of image URLs; repeatable. .example.org matches its subdomains."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may call the API; repeatable, * for all."),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path prefix under which a proxy serves the server: /models/tita.")
    ] = "",
    page: Annotated[bool, typer.Option(help="Serve a web page at /.")] = True,
    log_prompts: Annotated[bool, typer.Option(help="Log the prompts of requests.")] = False,
) -> None:
    """Run the inference server with OpenAI's and LLaVA's APIs."""
    # These import no torch: options are checked before anything heavy is loaded.
    from tita.align.forms import Guidance
    from tita.serve.api_keys import load_api_keys
    from tita.serve.serve_options import DEFAULT_ENGINE_OPTIONS, Limits, LoadOptions, ServeOptions

    alone, rewards = parse_rewards(reward)
    one_weight, weights = parse_weights(weight)
    guidance = Guidance.of(
        form=form, weight=one_weight, weights=weights, plausibility=plausibility,
        noise_step=noise_step, contrast=contrast,
    )  # fmt: skip
    models = LoadOptions(
        base=base, reward=alone, rewards=rewards, reference=reference, guidance=guidance,
        dtype=dtype.value,
        device_map=device_map, image_aspect=image_aspect.value,
        quantization=None if quantization is None else quantization.value, engine=engine.value,
    )  # fmt: skip
    asks_for_reward = guidance.uses_rewards and guidance.active and (weight or form != "tita")
    if asks_for_reward and not models.all_rewards:
        say("tita serve: without --reward, --weight and --form have no effect: the base answers")
    vllm = vllm_options(
        engine, dtype=dtype.value, tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size, nnodes=nnodes, node_rank=node_rank,
        master_addr=master_addr, master_port=master_port, max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization, enforce_eager=enforce_eager,
    )  # fmt: skip
    engine_options = replace(
        DEFAULT_ENGINE_OPTIONS, max_draft_rows=max_draft_rows, max_adapters=max_adapters,
        pack=pack, prefix_cache_bytes=prefix_cache_mib * 2**20,
    )  # fmt: skip
    if engine is EngineChoice.VLLM:
        vllm = replace(vllm, max_drafts=max_drafts or 0)
    elif max_drafts is not None:
        engine_options = replace(engine_options, max_drafts=max_drafts)
    options = ServeOptions(
        name=name, guidance=guidance, page=page, log_prompts=log_prompts,
        engine=engine_options,
        keys=load_api_keys(api_keys_file, check=models.check_weights),
        image_hosts=tuple(image_host or ()),
        allow_origins=tuple(allow_origin or ()),
        engine_name=engine.value, vllm=vllm,
        max_batch=max_batch or (16 if engine is EngineChoice.TRANSFORMERS else 256),
        max_waiting=max_waiting, deadline_s=deadline_s, grace_s=grace_s,
        header_timeout_s=header_timeout_s, max_bodies_bytes=max_bodies_mib * 2**20,
        root_path=root_path,
        limits=Limits(max_body_bytes=max_body_mib * 2**20, max_images=max_images),
    )  # fmt: skip

    with without_garbage_collection():
        from tita.serve.model_loading import load_models
        from tita.serve.server import InferenceServer

    if node_rank:
        from tita.engine.start import run_worker_node

        run_worker_node(
            load_models(models).models,
            replace(vllm, max_batch=options.max_batch),
            engine_options=options.engine,
        )
    server = InferenceServer(options, host=host, port=port)
    raise typer.Exit(server.run_until_drained(partial(load_models, models)))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    url: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:8000",
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image file, or a URL that the server may fetch; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name; default: the server's first model.")
    ] = None,
    weight: WeightOption = None,
    form: Annotated[str | None, typer.Option(help="Guidance form; default: the server's.")] = None,
    plausibility: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Plausibility bound; default: the server's."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of output tokens.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Sampling seed.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="TITA_API_KEY", help="API key.")] = None,
) -> None:
    """Ask a server a question. Tokens changed by guidance are highlighted."""
    from tita.serve.client import ask as ask_server

    text = read_question(question)
    one_weight, weights = parse_weights(weight)
    fields = {
        "model": model, "guidance_weight": one_weight, "guidance_weights": weights or None,
        "guidance_form": form,
        "guidance_plausibility": plausibility, "max_tokens": max_tokens,
        "temperature": temperature, "seed": seed,
    }  # fmt: skip
    ask_server(text, url=url, images=image or [], fields=fields, api_key=api_key)
