"""`tita-bench`: benchmark an OpenAI-compatible vision-language endpoint, or a local model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tita.cli.app import OutputFormat, new_app
from tita.terminal import Output, counted, emit, say

if TYPE_CHECKING:
    from tita.bench.tasks import BenchmarkTask
    from tita.bench.worker_pool import ClientOptions, RequestStats

app = new_app("Benchmark vision-language models: quality, latency, tokens and cost.")

Questions = Annotated[str, typer.Option(help="Question file: a path, or a file in the store.")]
Images = Annotated[
    str | None, typer.Option(help="Folder of images; default: the folder of the question file.")
]
Out = Annotated[Path, typer.Option(help="Results file; an existing one is resumed.")]
ModelName = Annotated[str, typer.Option(help="Short name in the registry, or model id.")]
BaseUrl = Annotated[str | None, typer.Option(help="Endpoint URL, up to and including /v1.")]
ApiKey = Annotated[
    str | None, typer.Option(help="API key; prefer --key-file or the registry's key_env.")
]
KeyFile = Annotated[Path | None, typer.Option(help="File that contains the API key.")]
RegistryFile = Annotated[Path | None, typer.Option(help="YAML file of models and prices.")]
LocalModel = Annotated[
    str | None, typer.Option(help="Model to run in this process: path, hub name or store tree.")
]
Reward = Annotated[str | None, typer.Option(help="Reward model that guides --local-model.")]
MaxQuestions = Annotated[
    int | None, typer.Option("--max", min=1, help="Maximum number of questions.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Maximum number of requests in flight.")]
Rate = Annotated[float | None, typer.Option(help="Maximum number of requests per second.")]
Timeout = Annotated[float, typer.Option(help="Timeout of one attempt in seconds.")]
Retries = Annotated[int, typer.Option(min=0, help="Maximum number of retries per question.")]


@app.callback()
def _root() -> None:
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

    items = write_sample(out, num=num, seed=seed)
    num_images = sum(len(item.images) for item in items)
    say(f"wrote {len(items)} questions to {out} and {num_images} images next to it")


@app.command()
def prepare(
    suite: Annotated[str, typer.Argument(help="pope, textvqa, mme, mmbench, ...; or unpack.")],
    source: Annotated[
        Path,
        typer.Option(help="Folder of the suite's published files; for unpack, the questions."),
    ],
    out: Annotated[Path, typer.Option(help="Question file to write.")],
) -> None:
    """Convert a published suite to a question file.

    `unpack` converts rows with embedded images instead.
    """
    from tita.bench.suites import prepare as prepare_suite

    say(f"wrote {prepare_suite(suite, source=source, out=out)} questions to {out}")


@app.command()
def run(
    questions: Questions,
    out: Out,
    model: ModelName = "tita",
    images: Images = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    local_model: LocalModel = None,
    reward: Reward = None,
    weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="Guidance weight, for `tita serve`.")
    ] = None,
    max_questions: MaxQuestions = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Ask a model all questions. A second run asks only those without an answer."""
    from tita.bench.worker_pool import ClientOptions

    task = _task(
        questions, images=images, out=out, max_questions=max_questions,
        max_new_tokens=max_new_tokens, temperature=temperature, weight=weight,
    )  # fmt: skip
    stats = _run_tasks(
        [task], model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        local_model=local_model, reward=reward,
        options=ClientOptions(
            concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries
        ),
    )  # fmt: skip
    _print_stats([out], stats)


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
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    local_model: LocalModel = None,
    reward: Reward = None,
    max_questions: MaxQuestions = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Run with several guidance weights. Plots score and latency by weight."""
    from tita.bench.benchmark_report import write_report
    from tita.bench.evaluate import evaluate as evaluate_folder
    from tita.bench.tasks import sweep_tasks
    from tita.bench.worker_pool import ClientOptions

    task = _task(
        questions, images=images, out=out, max_questions=max_questions,
        max_new_tokens=max_new_tokens, temperature=temperature, weight=None,
    )  # fmt: skip
    tasks = sweep_tasks(task, weights=_parse_weights(weights), model=model)
    stats = _run_tasks(
        tasks, model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        local_model=local_model, reward=reward,
        options=ClientOptions(
            concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries
        ),
    )  # fmt: skip
    print(write_report(evaluate_folder(out), folder=out, images=task.images), end="")
    _print_stats([task.out for task in tasks], stats)


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
    concurrency: Concurrency = 8,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Score open answers with a judge model. `eval` reports the scores."""
    from tita.bench.registry import resolve_endpoint
    from tita.bench.tasks import judge_answers
    from tita.bench.worker_pool import ClientOptions

    judged = out or results.with_name(f"{results.stem}.judged.jsonl")
    endpoint = resolve_endpoint(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry
    )
    options = ClientOptions(concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries)
    _print_stats([judged], [judge_answers(results, endpoint, out=judged, options=options)])


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
    output: OutputFormat = Output.TABLE,
) -> None:
    """Write a report on a folder of results files."""
    from tita.bench.benchmark_report import write_report
    from tita.bench.evaluate import evaluate as evaluate_folder
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
    evaluation = evaluate_folder(folder, registry=load_registry(registry))
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
    say(f"wrote {written / 'report.html'}, report.json and benchmark_report.txt")


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
        typer.Option(help="Exit 1 if the score difference B - A is below this many points."),
    ] = None,
    fail_slower: Annotated[
        float | None,
        typer.Option(help="Exit 1 if the ratio of mean response times B / A is above this."),
    ] = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Compare two runs question by question.

    Prints differences with confidence intervals, McNemar's test and changed answers.
    """
    from tita.bench.benchmark_report import comparison_page, comparison_text
    from tita.bench.compare import check_gates, pair_runs
    from tita.bench.compare import compare as compare_runs
    from tita.bench.evaluate import read_runs
    from tita.bench.questions import local_path
    from tita.errors import ExitCode

    first, second = local_path(a), local_path(b)
    pairs = pair_runs(read_runs(first), read_runs(second))
    comparisons = [compare_runs(left, right) for left, right in pairs]
    if output is Output.TABLE:
        print("\n".join(comparison_text(comparison) for comparison in comparisons), end="")
    else:
        emit([dict(comparison.summary) for comparison in comparisons], output=output)
    if out is not None:
        comparison_page(comparisons, images=images or second.parent).write(out)
        say(f"wrote {out}")
    broken = [
        text
        for comparison in comparisons
        for text in check_gates(comparison.summary, fail_below=fail_below, fail_slower=fail_slower)
    ]
    for text in broken:
        say(f"gate: {text}")
    if broken:
        raise typer.Exit(ExitCode.FAILED)


def _task(
    questions: str,
    *,
    images: str | None,
    out: Path,
    max_questions: int | None,
    max_new_tokens: int,
    temperature: float,
    weight: float | None,
) -> "BenchmarkTask":
    from tita.bench.questions import image_folder, question_file
    from tita.bench.tasks import BenchmarkTask
    from tita.bench.worker_pool import GenerationOptions
    from tita.errors import TitaError

    file = question_file(questions)
    folder = image_folder(images, questions=file)
    if str(out).startswith("s3:/"):
        raise TitaError(
            "a results file is appended to, which the store does not support",
            where=str(out),
            remedy="give a local path, and publish with `tita-bench eval --publish`",
        )
    generation = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, weight=weight
    )
    return BenchmarkTask(
        questions=file, images=folder, out=out, limit=max_questions, generation=generation
    )


def _run_tasks(
    tasks: "list[BenchmarkTask]",
    model: str,
    *,
    base_url: str | None,
    api_key: str | None,
    key_file: Path | None,
    registry: Path | None,
    local_model: str | None,
    reward: str | None,
    options: "ClientOptions",
) -> "list[RequestStats]":
    """Run each task on `local_model` if it is given, else on an endpoint."""
    from tita.errors import TitaError

    if local_model is not None:
        from tita.bench.local_model import run_local

        return [
            run_local(
                task, name=model, base=local_model, reward=reward, batch_size=options.concurrency
            )
            for task in tasks
        ]
    if reward is not None:
        raise TitaError("--reward needs --local-model", remedy="give --local-model too")
    from tita.bench.registry import resolve_endpoint
    from tita.bench.tasks import run_endpoint

    endpoint = resolve_endpoint(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry
    )
    return [run_endpoint(task, endpoint, options=options) for task in tasks]


def _parse_weights(text: str) -> list[float]:
    from tita.errors import TitaError

    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or len(set(weights)) < len(weights) or not all(0 <= w <= 1 for w in weights):
        raise TitaError(
            f"{text!r} is not a list of distinct numbers between 0 and 1",
            where="--weights",
            remedy="give for example --weights 0,0.1,0.3",
        )
    return weights


def _print_stats(outs: list[Path], stats: "list[RequestStats]") -> None:
    """Print the counts of each run; exit with 1 if a question failed."""
    from tita.errors import ExitCode

    for out, one in zip(outs, stats, strict=True):
        answered = one.num_asked - one.num_failed + one.num_kept
        before = f" ({one.num_kept} from an earlier run)" if one.num_kept else ""
        say(f"{answered} questions answered{before} in {out}, {one.wall_s:.1f} s")
        if one.num_empty:
            say(f"{counted(one.num_empty, 'answer')} without any text")
        if one.num_failed:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(one.errors.items()))
            say(f"{one.num_failed} failed: {kinds}; run the same command again to retry them")
    if any(one.num_failed for one in stats):
        raise typer.Exit(ExitCode.FAILED)
