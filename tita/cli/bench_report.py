"""`tita-bench eval` and `compare`: the commands that report on results."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.bench import app
from tita.terminal import Output, emit, say

Form = Annotated[Output, typer.Option("-o", "--output", help="Form of the result.")]
RegistryFile = Annotated[Path | None, typer.Option(help="YAML of models and prices.")]


@app.command("eval")
def evaluate(
    where: Annotated[str, typer.Option("--dir", help="Folder of results: here or in the store.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; --dir if not given.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; --dir if not given.")
    ] = None,
    registry: RegistryFile = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also put the report into the store.")
    ] = False,
    output: Form = Output.TABLE,
) -> None:
    """Report on all results files of a folder: report.json, report.html, benchmark_report.txt."""
    from tita.bench.benchmark_report import write_report
    from tita.bench.evaluate import evaluate as evaluate_folder
    from tita.bench.questions import local_path
    from tita.bench.registry import load_registry

    folder = local_path(where)
    written = _report_folder(out, where=where, folder=folder)
    evaluation = evaluate_folder(folder, registry=load_registry(registry))
    if publish:
        from tita.bench.archive import publish as publish_report
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
    a: Annotated[str, typer.Argument(help="Results file, the one to measure against.")],
    b: Annotated[str, typer.Argument(help="Results file on the same questions.")],
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images; B's if not given.")] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit 1 if the score, B less A, is below so many points of 100."),
    ] = None,
    fail_slower: Annotated[
        float | None, typer.Option(help="Exit 1 if B's mean time is above so many times A's.")
    ] = None,
    output: Form = Output.TABLE,
) -> None:
    """Pair two runs by question: differences with intervals, McNemar's test, what flipped."""
    from tita.bench.benchmark_report import comparison_page, comparison_text
    from tita.bench.compare import compare as compare_runs
    from tita.bench.compare import gate, pair_runs
    from tita.bench.evaluate import runs_of
    from tita.bench.questions import local_path
    from tita.errors import ExitCode

    first, second = local_path(a), local_path(b)
    pairs = pair_runs(runs_of(first), runs_of(second))
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
        for text in gate(comparison.summary, fail_below=fail_below, fail_slower=fail_slower)
    ]
    for text in broken:
        say(f"gate: {text}")
    if broken:
        raise typer.Exit(ExitCode.FAILED)


def _report_folder(out: Path | None, *, where: str, folder: Path) -> Path:
    """Where a report on the results in `folder` is written.

    Raises:
        TitaError: the results lie in the store, whose trees never change, and `out` is missing.
    """
    from tita.errors import TitaError

    if out is None:
        if where.startswith(("/", "./", "../", "~")) or folder == Path(where):
            return folder
        raise TitaError(
            "the results lie in the store", where=where, remedy="give --out for the report"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out
