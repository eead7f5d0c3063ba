"""`tita-bench suite`, methods of `sweep`, and answers in the layouts of other tools."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tita.cli.bench_options import (
    ApiKey,
    BaseUrl,
    Concurrency,
    KeyFile,
    LocalModel,
    MaxQuestions,
    ModelName,
    Rate,
    RegistryFile,
    Retries,
    Reward,
    Timeout,
    make_asker,
    parse_weights,
    print_stats,
)
from tita.cli.engine_arguments import EngineChoice, EngineOption
from tita.terminal import say

if TYPE_CHECKING:
    from tita.bench.methods import Method
    from tita.bench.tasks import BenchmarkTask
    from tita.bench.worker_pool import RequestStats

BeforeDpo = Annotated[
    str | None,
    typer.Option(
        help="Reward model before DPO, for --controls: its name on the server, or with "
        "--local-model a path."
    ),
]


def suite(
    source: Annotated[Path, typer.Option(help="Folder of the published files of the sets.")],
    out: Annotated[Path, typer.Option(help="Folder for questions, answers and the report.")],
    name: Annotated[str, typer.Option(help="Name of the suite.")] = "hallucination",
    weights: Annotated[
        str, typer.Option(help="Guidance weights, separated by commas.")
    ] = "0,0.1,0.3,0.5",
    sets: Annotated[
        str | None, typer.Option(help="Sets to take, separated by commas; default: all found.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Further methods, such as vcd,m3id,best-of-4.", metavar="NAME,..."),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also run the reward model before DPO, and with --local-model other images.",
        ),
    ] = False,
    before_dpo: BeforeDpo = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge model, for sets with open answers.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Endpoint URL of the judge, up to and including /v1.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also ask which tokens guidance changed, to mark them; guided answers then take "
            "longer.",
        ),
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Ask nothing; report on the answers there are.")
    ] = False,
    model: ModelName = "tita",
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    key_file: KeyFile = None,
    registry: RegistryFile = None,
    local_model: LocalModel = None,
    engine: EngineOption = EngineChoice.TRANSFORMERS,
    reward: Reward = None,
    max_questions: MaxQuestions = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    timeout: Timeout = 120.0,
    retries: Retries = 5,
) -> None:
    """Compare a base model with the aligned one on all sets that lie in a folder.

    A second run asks only questions without an answer. Writes report.html.
    """
    from tita.bench.load_shape import client_options
    from tita.bench.outcomes import ErrorMessages
    from tita.bench.registry import resolve_endpoint
    from tita.bench.tasks import judge_answers
    from tita.errors import ExitCode
    from tita.suites.comparison import check_base_answered
    from tita.suites.runner import plan_suite, read_suite, run_suite, suite_methods
    from tita.suites.suite_report import make_report, write_report

    chosen = suite_methods(
        parse_weights(weights),
        controls=controls,
        local=local_model is not None,
        before_dpo=before_dpo or "",
        explain=explain,
    )
    if methods:
        chosen = _with_others(chosen, methods)
    plan = plan_suite(
        name, source=source, out=out, methods=chosen, limit=max_questions,
        only=[part.strip() for part in sets.split(",")] if sets else (),
        has_judge=judge is not None or report_only,
    )  # fmt: skip
    options = client_options(concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries)
    if not report_only:
        ask = make_asker(
            model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry,
            local_model=local_model, reward=reward, engine=engine, before_dpo=before_dpo,
        )  # fmt: skip
        reviewer = None
        if judge is not None:
            judged_by = resolve_endpoint(judge, base_url=judge_url, registry=registry)

            def reviewer(results: Path) -> "RequestStats":
                reviews = results.with_name(f"{results.stem}.judged.jsonl")
                return judge_answers(results, judged_by, out=reviews, options=options)

        stats = run_suite(plan, lambda task: ask(task, options), judge=reviewer)
    runs = read_suite(plan)
    check_base_answered(runs)
    print(write_report(make_report(runs, chosen), folder=out), end="")
    say(f"wrote {out / 'report.html'}, report.zh.html, report.txt and report.json")
    if not report_only and any(one.num_failed for one in stats):
        num = sum(one.num_failed for one in stats)
        say(f"{num} questions failed; run the same command again to ask them")
        messages = ErrorMessages()
        for text in (text for one in stats for text in one.messages.lines()):
            messages.add(text)
        for text in messages.lines():
            say(f"  {text}")
        raise typer.Exit(ExitCode.FAILED)


def _with_others(chosen: "list[Method]", text: str) -> "list[Method]":
    from tita.bench.methods import parse_methods

    known = {method.name for method in chosen}
    others = parse_methods(text, weights=[])
    return [*chosen, *(method for method in others if method.name not in known)]


def compare_methods(
    task: "BenchmarkTask",
    chosen: "list[Method]",
    ask: "Callable[[BenchmarkTask], RequestStats]",
    *,
    out: Path,
    front: str | None,
) -> None:
    """Ask one question file by several methods, and write the report that compares them.

    Raises:
        TitaError: `front` names no two figures.
    """
    from tita.suites.question_file import method_tasks, methods_report
    from tita.suites.suite_report import write_report

    tasks = method_tasks(task, chosen, out=out)
    stats = [ask(one) for one in tasks]
    report = methods_report(tasks, chosen, out=out, front=front)
    print(write_report(report, folder=out), end="")
    say(f"wrote {out / 'report.html'}, report.zh.html, report.txt and report.json")
    print_stats([one.out for one in tasks], stats)


def export(
    results: Annotated[Path, typer.Option(help="Results file with the answers.")],
    questions: Annotated[Path, typer.Option(help="Its question file.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[str, typer.Option(help="lmms-eval or vlmevalkit.")],
    task: Annotated[str, typer.Option(help="Task of lmms-eval, such as pope.")] = "",
) -> None:
    """Write answers in another tool's layout, so that its own scorers can be run on them."""
    from tita.suites.other_tools import FORMATS, export_answers

    known = next((name for name in FORMATS if name == format.lower()), format)
    num = export_answers(results, format=known, out=out, questions=questions, task=task)  # type: ignore[arg-type]
    say(f"wrote {num} answers to {out}")


def import_predictions(
    predictions: Annotated[
        Path, typer.Option(help="Predictions of VLMEvalKit (xlsx, tsv) or lmms-eval (jsonl, json).")
    ],
    questions: Annotated[Path, typer.Option(help="Question file of the same set.")],
    out: Annotated[Path, typer.Option(help="Results file to write.")],
    model: Annotated[str, typer.Option(help="Model name in the results file.")] = "imported",
) -> None:
    """Turn another tool's predictions into a results file, to score and compare them here."""
    from tita.suites.other_tools import import_answers

    num = import_answers(predictions, questions=questions, out=out, model=model)
    say(f"wrote {num} answers to {out}")
