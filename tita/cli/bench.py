"""`tita-bench`: benchmark an OpenAI-compatible vision-language endpoint, or a local model."""

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from tita.bench.load_shape import Arrivals
from tita.bench.reasoning import Thinking
from tita.cli.app import IgnoreColumn, OutputFormat, VersionOption, new_app
from tita.cli.bench_options import (
    ApiKey,
    ArrivalPattern,
    BaseUrl,
    Body,
    Concurrency,
    Duration,
    FetchImages,
    Goodput,
    IgnoreEos,
    ImageHost,
    Images,
    KeyFile,
    LocalModel,
    MaxNewTokens,
    MaxQuestions,
    MetricName,
    ModelName,
    Omit,
    Out,
    PrivateHosts,
    Questions,
    Rate,
    RegistryFile,
    Rename,
    Retries,
    Reward,
    Temperature,
    ThinkingMode,
    Timeout,
    WarmUp,
    make_asker,
    make_downloads,
    make_task,
    parse_concurrencies,
    parse_overrides,
    parse_seconds,
    parse_weights,
    print_stats,
)  # fmt: skip
from tita.cli.bench_suite import compare_methods, export, import_predictions, suite
from tita.cli.engine_arguments import EngineChoice, EngineOption
from tita.cli.guidance_options import WeightOption
from tita.cli.guidance_options import parse_weights as parse_named_weights
from tita.imports import without_garbage_collection
from tita.terminal import Output, emit, say

app = new_app("Benchmark vision-language models: quality, latency, tokens and cost.")


@app.callback()
def _root(version: VersionOption = False) -> None:
    from tita.terminal import configure_logging

    configure_logging()


@app.command()
def sample(
    out: Annotated[
        Path, typer.Option(help="Question file to write; images are written next to it.")
    ],
    num: Annotated[int, typer.Option(help="Number of questions.")] = 24,
    seed: Annotated[int, typer.Option(help="Random seed of the questions.")] = 0,
) -> None:
    """Write sample questions with reference answers and real images."""
    from tita.bench.sample import write_sample
    from tita.storage.files import naming_full_disk

    with naming_full_disk(out.parent):
        items = write_sample(out, num=num, seed=seed)
    num_images = sum(len(item.images) for item in items)
    say(f"wrote {len(items)} questions to {out} and {num_images} images next to it")


@app.command()
def prepare(
    suite: Annotated[
        str, typer.Argument(help="pope, chair, amber, mmstar, textvqa, mme, ...; or unpack.")
    ],
    source: Annotated[
        Path,
        typer.Option(help="Folder of the suite's published files; for unpack, the questions."),
    ],
    out: Annotated[Path, typer.Option(help="Question file to write.")],
    metric: Annotated[
        str, typer.Option(help="Metric of the questions; default: the suite's own.")
    ] = "",
    fetch_images: FetchImages = False,
    image_host: ImageHost = None,
    private_hosts: PrivateHosts = False,
) -> None:
    """Convert a published suite to a question file.

    `unpack` converts rows with embedded images instead, and with --fetch-images rows with URLs.
    """
    from tita.bench.suites import prepare as prepare_suite
    from tita.bench.suites import suite_names

    downloads = make_downloads(
        fetch_images, folder=out.parent, image_host=image_host, private_hosts=private_hosts
    )
    if suite in suite_names() or suite == "unpack":
        num = prepare_suite(suite, source=source, out=out, metric=metric, downloads=downloads)
    else:
        from tita.suites.set_runs import prepare_named

        num = prepare_named(suite, source=source, out=out)
    say(f"wrote {num} questions to {out}")


@app.command()
def run(
    questions: Questions,
    out: Out,
    model: ModelName = "tita",
    images: Images = None,
    fetch_images: FetchImages = False,
    image_host: ImageHost = None,
    private_hosts: PrivateHosts = False,
    ignore_column: IgnoreColumn = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    local_model: LocalModel = None,
    engine: EngineOption = EngineChoice.TRANSFORMERS,
    reward: Reward = None,
    weight: WeightOption = None,
    metric: MetricName = "",
    max_questions: MaxQuestions = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = False,
    thinking: ThinkingMode = Thinking.AUTO,
    omit: Omit = None,
    rename: Rename = None,
    body: Body = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    arrivals: ArrivalPattern = Arrivals.CONSTANT,
    load_sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            metavar="N,N,...",
            help="Run once per number of requests in flight, with one results file each.",
        ),
    ] = None,
    duration: Duration = None,
    warm_up: WarmUp = 0,
    goodput: Goodput = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Ask a model all questions. A second run asks only those without an answer."""
    from tita.bench.load_figures import parse_goodput
    from tita.bench.load_shape import client_options
    from tita.bench.tasks import load_tasks

    one_weight, weights = parse_named_weights(weight)
    task = make_task(
        questions, images=images, fetch_images=fetch_images, image_host=image_host,
        private_hosts=private_hosts, ignore_column=ignore_column, out=out,
        max_questions=max_questions,
        max_new_tokens=max_new_tokens, temperature=temperature, weight=one_weight,
        weights=weights, metric=metric,
        fixed_length=ignore_eos, thinking=thinking,
        overrides=parse_overrides(omit=omit, rename=rename, body=body),
    )  # fmt: skip
    options = client_options(
        concurrency=concurrency, rate=rate, arrivals=arrivals,
        duration_s=parse_seconds(duration, option="--duration") if duration else None,
        warm_up=warm_up, timeout_s=timeout, retries=retries,
        goodput=parse_goodput(goodput) if goodput else None,
    )  # fmt: skip
    tasks = [(task, options)]
    if load_sweep is not None:
        tasks = load_tasks(task, options, concurrencies=parse_concurrencies(load_sweep))
    ask = make_asker(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        local_model=local_model, reward=reward, engine=engine,
    )  # fmt: skip
    stats = [ask(*each) for each in tasks]
    print_stats([task.out for task, _ in tasks], stats)


@app.command()
def sweep(
    questions: Questions,
    out: Annotated[
        Path, typer.Option(help="Folder for one results file per weight, and the report.")
    ],
    weights: Annotated[
        str, typer.Option(help="Guidance weights, separated by commas.")
    ] = "0,0.1,0.3,0.5,0.7,1",
    model: ModelName = "tita",
    images: Images = None,
    fetch_images: FetchImages = False,
    image_host: ImageHost = None,
    private_hosts: PrivateHosts = False,
    ignore_column: IgnoreColumn = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    local_model: LocalModel = None,
    engine: EngineOption = EngineChoice.TRANSFORMERS,
    reward: Reward = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Methods to compare: base, guided (each of --weights), vcd, m3id, cfg, best-of-4, "
            "or rewards as faithful=0.3+brief=0.1.",
        ),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(help="Two figures whose front is shown, such as 'CHAIR_i,recall'."),
    ] = None,
    metric: MetricName = "",
    max_questions: MaxQuestions = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = False,
    thinking: ThinkingMode = Thinking.AUTO,
    omit: Omit = None,
    rename: Rename = None,
    body: Body = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    warm_up: WarmUp = 0,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Run with several guidance weights, or methods, and compare them.

    Of several weights one is chosen on a part of the questions and reported on the rest.
    """
    from tita.bench.benchmark_report import write_report
    from tita.bench.evaluate import evaluate as evaluate_folder
    from tita.bench.load_shape import client_options
    from tita.bench.tasks import sweep_tasks

    task = make_task(
        questions, images=images, fetch_images=fetch_images, image_host=image_host,
        private_hosts=private_hosts, ignore_column=ignore_column, out=out,
        max_questions=max_questions,
        max_new_tokens=max_new_tokens, temperature=temperature, weight=None, metric=metric,
        fixed_length=ignore_eos, thinking=thinking,
        overrides=parse_overrides(omit=omit, rename=rename, body=body),
    )  # fmt: skip
    options = client_options(
        concurrency=concurrency, rate=rate, warm_up=warm_up, timeout_s=timeout, retries=retries
    )
    ask = make_asker(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        local_model=local_model, reward=reward, engine=engine,
    )  # fmt: skip
    if methods is not None:
        from tita.bench.methods import parse_methods

        chosen = parse_methods(methods, weights=parse_weights(weights))
        compare_methods(task, chosen, lambda one: ask(one, options), out=out, front=front)
        return
    tasks = sweep_tasks(task, weights=parse_weights(weights), model=model)
    stats = [ask(each, options) for each in tasks]
    print(write_report(evaluate_folder(out), folder=out, images=task.images), end="")
    if any(one.generation.weight == 0 for one in tasks) and len(tasks) > 1:
        from tita.suites.question_file import weight_choice

        print("\n" + weight_choice(tasks), end="")
    print_stats([task.out for task in tasks], stats)


app.command()(suite)
app.command()(export)
app.command("import")(import_predictions)


@app.command()
def judge(
    results: Annotated[Path, typer.Option(help="Results file with the answers to judge.")],
    model: ModelName,
    out: Annotated[
        Path | None, typer.Option(help="File of judgements; default: RESULTS.judged.jsonl.")
    ] = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Score open answers with a judge model. `eval` reports the scores."""
    from tita.bench.load_shape import client_options
    from tita.bench.registry import resolve_endpoint
    from tita.bench.tasks import judge_answers

    judged = out or results.with_name(f"{results.stem}.judged.jsonl")
    endpoint = resolve_endpoint(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry
    )
    options = client_options(concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries)
    print_stats([judged], [judge_answers(results, endpoint, out=judged, options=options)])


@app.command("eval")
def evaluate(
    where: Annotated[
        str, typer.Option("--dir", help="Folder of results files: a path, or in the store.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; default: --dir.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: --dir.")] = None,
    registry: RegistryFile = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also publish the report to the store.")
    ] = False,
    goodput: Goodput = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Write a report on a folder of results files."""
    with without_garbage_collection():
        from tita.bench.benchmark_report import write_report
        from tita.bench.evaluate import evaluate as evaluate_folder
    from tita.bench.load_figures import parse_goodput
    from tita.bench.questions import local_path
    from tita.bench.registry import load_registry
    from tita.errors import TitaError

    folder = local_path(where)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    elif folder != Path(where).expanduser():
        raise TitaError(
            "no report can be written next to results in the store",
            where=where,
            remedy="give --out",
        )
    written = out or folder
    limits = parse_goodput(goodput) if goodput else None
    evaluation = evaluate_folder(folder, registry=load_registry(registry), goodput=limits)
    if publish:
        from tita.bench.publish import publish as publish_report
        from tita.storage import open_store

        store = open_store()
        entry = publish_report(
            evaluation, folder=folder, out=written, images=images or folder, store=store
        )
        say(f"published report {entry['id']} to {store.uri}")
        text = (written / "benchmark_report.txt").read_text(encoding="utf-8")
    else:
        text = write_report(evaluation, folder=written, images=images or folder)
    if output is Output.TABLE:
        print(text, end="")
    else:
        emit(evaluation.report, output=output)
    say(f"wrote {written / 'report.html'}, report.json, benchmark_report.txt and figures.csv")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Results file of the baseline.")],
    b: Annotated[str, typer.Argument(help="Results file on the same questions.")],
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; default: the folder of B.")
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit 10 if the score difference B - A is below this many points."),
    ] = None,
    fail_slower: Annotated[
        float | None,
        typer.Option(help="Exit 10 if the ratio of mean response times B / A is above this."),
    ] = None,
    different_loads: Annotated[
        bool,
        typer.Option("--different-loads", help="Also compare times measured under other loads."),
    ] = False,
    max_missing: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Exit 69 if a larger share of the questions has no answer in A or B; gates fail.",
        ),
    ] = 0.02,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Compare two runs question by question.

    Prints differences with confidence intervals, McNemar's test and changed answers.
    """
    with without_garbage_collection():
        from tita.bench.benchmark_report import comparison_page, comparison_text
    from tita.bench.compare import check_gates, missing_too_many, pair_runs
    from tita.bench.compare import compare as compare_runs
    from tita.bench.evaluate import read_runs
    from tita.bench.questions import local_path
    from tita.errors import ExitCode, TitaError

    for option, bound in (("--fail-below", fail_below), ("--fail-slower", fail_slower)):
        # Nothing is ever below or above NaN.
        if bound is not None and not isfinite(bound):
            raise TitaError(f"{bound} is no finite number", where=option, remedy="give a number")
    first, second = local_path(a), local_path(b)
    pairs = pair_runs(read_runs(first), read_runs(second))
    comparisons = [compare_runs(left, right, any_load=different_loads) for left, right in pairs]
    for comparison in comparisons:
        differ = comparison.summary["loads_differ"]
        if differ and fail_slower is not None and not different_loads:
            raise TitaError(
                f"--fail-slower compares times of different loads: {differ}",
                where=str(second),
                remedy="measure both under one load, or give --different-loads",
            )
    if output is Output.TABLE:
        print("\n".join(comparison_text(comparison) for comparison in comparisons), end="")
    else:
        emit([dict(comparison.summary) for comparison in comparisons], output=output)
    if out is not None:
        comparison_page(comparisons, images=images or second.parent).write(out)
        say(f"wrote {out}")
    summaries = [comparison.summary for comparison in comparisons]
    missed = [
        text
        for summary in summaries
        for text in check_gates(
            summary, fail_below=fail_below, fail_slower=fail_slower, max_missing=max_missing
        )
    ]
    for text in missed:
        say(f"gate: {text}")
    if missed:
        raise typer.Exit(ExitCode.GATE_MISSED)
    incomplete = [t for s in summaries for t in missing_too_many(s, max_missing=max_missing)]
    for text in incomplete:
        say(text)
    if incomplete:
        raise typer.Exit(ExitCode.INCOMPLETE)
