"""`tita-bench`: benchmark any OpenAI-compatible vision-language endpoint, or a model here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tita.cli.app import new_app

if TYPE_CHECKING:
    from tita.bench.asking import Tally

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


Questions = Annotated[str, typer.Option(help="Question file: a path, or in the store.")]
Images = Annotated[str | None, typer.Option(help="Folder of images; beside the questions if not.")]


@app.command()
def run(
    questions: Questions,
    out: Annotated[Path, typer.Option(help="Results file; one that is there is carried on.")],
    model: Annotated[str, typer.Option(help="Short name of the registry, or a model id.")] = "tita",
    images: Images = None,
    base_url: Annotated[str | None, typer.Option(help="Endpoint, up to /v1.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key; better by variable or file.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="File that holds the key.")] = None,
    registry: Annotated[Path | None, typer.Option(help="YAML of models and prices.")] = None,
    max_questions: Annotated[
        int | None, typer.Option("--max", min=1, help="Ask only the first so many.")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="Guidance weight, for our own server.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions under way at once.")] = 8,
    rate: Annotated[float | None, typer.Option(help="Most requests a second.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one attempt may take.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Attempts after the first.")] = 5,
) -> None:
    """Ask a model all questions; run it again to ask only what is missing or failed."""
    from tita.bench.asking import Generation, Manners
    from tita.bench.places import image_folder, local_path
    from tita.bench.registry import endpoint_of, find_key, load_registry
    from tita.bench.running import Task, run_endpoint

    file = local_path(questions)
    task = Task(
        questions=file,
        images=image_folder(images, questions=file),
        out=out,
        limit=max_questions,
        generation=Generation(
            max_new_tokens=max_new_tokens, temperature=temperature, weight=weight
        ),
    )
    entry = load_registry(registry).find(model)
    key = find_key(entry, api_key=api_key, key_file=key_file, base_url=base_url)
    tally = run_endpoint(
        task,
        name=model,
        model=entry,
        base_url=endpoint_of(entry, name=model, base_url=base_url),
        key=key,
        manners=Manners(concurrency=concurrency, rate=rate, timeout_s=timeout, retries=retries),
    )
    _tell(tally, out)


def _tell(tally: "Tally", out: Path) -> None:
    from tita.errors import ExitCode
    from tita.terminal import say

    answered = tally.num_asked - tally.num_failed + tally.num_kept
    before = f" ({tally.num_kept} stood there before)" if tally.num_kept else ""
    say(f"{answered} questions answered{before} in {out}, {tally.wall_s:.1f} s")
    if tally.num_failed:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(tally.errors.items()))
        say(f"{tally.num_failed} failed: {kinds}; run the same command again to ask them")
        raise typer.Exit(ExitCode.FAILED)


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of results files.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; --dir if not.")] = None,
    registry: Annotated[Path | None, typer.Option(help="YAML of models and prices.")] = None,
    publish: Annotated[bool, typer.Option(help="Also put the report into the store.")] = False,
    output: Annotated[str, typer.Option("-o", help="table, json or yaml, on standard output.")] = (
        "table"
    ),
) -> None:
    """Report on all results files of a folder: report.json, report.html, benchmark_report.txt."""
    from tita.bench.evaluate import evaluate as evaluate_folder
    from tita.bench.registry import load_registry
    from tita.bench.reporting import write_report
    from tita.terminal import Output, emit, say

    evaluation = evaluate_folder(folder, registry=load_registry(registry))
    text = write_report(evaluation, folder=folder, images=images or folder, publish=publish)
    if Output(output) is Output.TABLE:
        print(text, end="")
    else:
        emit(evaluation.report, output=Output(output))
    say(f"wrote {folder / 'report.html'}, report.json and benchmark_report.txt")


@app.command()
def prepare(
    suite: Annotated[str, typer.Argument(help="pope, textvqa, mme, mmbench, ...")],
    source: Annotated[Path, typer.Option(help="Folder of the set's published files.")],
    out: Annotated[Path, typer.Option(help="Question file to write.")],
) -> None:
    """Turn the published files of an evaluation set into a question file."""
    from tita.bench.suites import prepare as prepare_suite
    from tita.terminal import say

    say(f"wrote {prepare_suite(suite, source=source, out=out)} questions to {out}")
