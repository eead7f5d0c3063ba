"""`tita-bench run`, `sweep` and `judge`: the commands that ask models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tita.cli.bench import app

if TYPE_CHECKING:
    from tita.bench.tasks import Source
    from tita.bench.worker_pool import RequestStats

Questions = Annotated[str, typer.Option(help="Question file: a path, or in the store.")]
Images = Annotated[
    str | None, typer.Option(help="Folder of images; the questions' folder if not given.")
]
Out = Annotated[Path, typer.Option(help="Results file; one that is there is carried on.")]
ModelName = Annotated[str, typer.Option(help="Short name of the registry, or a model id.")]
BaseUrl = Annotated[str | None, typer.Option(help="EndpointClient, up to /v1.")]
ApiKey = Annotated[str | None, typer.Option(help="Key; better by variable or file.")]
KeyFile = Annotated[Path | None, typer.Option(help="File that holds the key.")]
RegistryFile = Annotated[Path | None, typer.Option(help="YAML of models and prices.")]
LocalModel = Annotated[
    str | None, typer.Option(help="Ask a model in this process: path, hub name or store tree.")
]
Reward = Annotated[str | None, typer.Option(help="Reward model that steers --local-model.")]
Max = Annotated[int | None, typer.Option("--max", min=1, help="Ask only the first so many.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Questions under way at once.")]
Rate = Annotated[float | None, typer.Option(help="Most requests a second.")]
Timeout = Annotated[float, typer.Option(help="Seconds that one attempt may take.")]
Retries = Annotated[int, typer.Option(min=0, help="Attempts after the first.")]


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
        float | None, typer.Option(min=0, max=1, help="Guidance weight, for our own server.")
    ] = None,
    max_questions: Max = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Ask a model all questions; run it again to ask only what is missing or failed."""
    from tita.bench.questions import image_folder, question_file
    from tita.bench.results_file import results_path
    from tita.bench.tasks import BenchmarkTask, answer
    from tita.bench.worker_pool import GenerationOptions

    file = question_file(questions)
    task = BenchmarkTask(
        questions=file,
        images=image_folder(images, questions=file),
        out=results_path(out),
        limit=max_questions,
        generation=GenerationOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, weight=weight
        ),
    )
    source = _source(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        local_model=local_model, reward=reward,
        concurrency=concurrency, rate=rate, timeout=timeout, retries=retries,
    )  # fmt: skip
    _tell([(out, answer(task, source))])


@app.command()
def sweep(
    questions: Questions,
    out: Annotated[Path, typer.Option(help="Folder: a results file a weight, and the report.")],
    weights: Annotated[str, typer.Option(help="Guidance weights.")] = "0,0.1,0.3,0.5,0.7,1",
    model: ModelName = "tita",
    images: Images = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    local_model: LocalModel = None,
    reward: Reward = None,
    max_questions: Max = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Ask one endpoint with several guidance weights, and plot score and latency against them."""
    from tita.bench.benchmark_report import write_report
    from tita.bench.evaluate import evaluate
    from tita.bench.questions import image_folder, question_file
    from tita.bench.results_file import results_path
    from tita.bench.tasks import BenchmarkTask, parse_weights, sweep_tasks
    from tita.bench.tasks import answer as answer_task
    from tita.bench.worker_pool import GenerationOptions

    file = question_file(questions)
    folder = image_folder(images, questions=file)
    task = BenchmarkTask(
        questions=file,
        images=folder,
        out=results_path(out),
        limit=max_questions,
        generation=GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature),
    )
    source = _source(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        local_model=local_model, reward=reward,
        concurrency=concurrency, rate=rate, timeout=timeout, retries=retries,
    )  # fmt: skip
    tasks = sweep_tasks(task, weights=parse_weights(weights), model=model)
    tallies = [(task.out, answer_task(task, source)) for task in tasks]
    print(write_report(evaluate(out), folder=out, images=folder), end="")
    _tell(tallies)


@app.command()
def judge(
    results: Annotated[Path, typer.Option(help="Results file whose answers are judged.")],
    model: ModelName,
    out: Annotated[
        Path | None, typer.Option(help="Judgements; RESULTS.judged.jsonl if not given.")
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
    """Have a model score free answers as MM-Vet and LLaVA-Bench do; `eval` then reports them."""
    from tita.bench.tasks import judge_answers

    judged = out or results.with_name(f"{results.stem}.judged.jsonl")
    source = _source(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
        concurrency=concurrency, rate=rate, timeout=timeout, retries=retries,
    )  # fmt: skip
    _tell([(judged, judge_answers(results, source=source, out=judged))])


def _source(
    model: str,
    *,
    base_url: str | None,
    api_key: str | None,
    key_file: Path | None,
    registry: Path | None,
    concurrency: int,
    rate: float | None,
    timeout: float,
    retries: int,
    local_model: str | None = None,
    reward: str | None = None,
) -> "Source":
    """Who answers and how it is asked, from the options that these commands share."""
    from tita.bench.tasks import Source
    from tita.bench.worker_pool import ClientOptions

    return Source(
        model=model,
        base_url=base_url,
        api_key=api_key,
        key_file=key_file,
        registry=registry,
        local_model=local_model,
        reward=reward,
        manners=ClientOptions(
            concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries
        ),
    )


def _tell(tallies: "list[tuple[Path, RequestStats]]") -> None:
    """Say what came of each run; exit status 1 if any question failed."""
    from tita.errors import ExitCode
    from tita.terminal import say

    for out, tally in tallies:
        answered = tally.num_asked - tally.num_failed + tally.num_kept
        before = f" ({tally.num_kept} stood there before)" if tally.num_kept else ""
        say(f"{answered} questions answered{before} in {out}, {tally.wall_s:.1f} s")
        if tally.num_failed:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(tally.errors.items()))
            say(f"{tally.num_failed} failed: {kinds}; run the same command again to ask them")
    if any(tally.num_failed for _, tally in tallies):
        raise typer.Exit(ExitCode.FAILED)
