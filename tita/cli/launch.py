"""`tita launch`: submit a job and watch it, on a cluster or on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tita.cli.app import app
from tita.terminal import Output, counted, emit, say

if TYPE_CHECKING:
    from tita.launch.cluster import Cluster
    from tita.launch.submit import LaunchRequest

Release = Annotated[str | None, typer.Option(help="Release of the chart, if there are several.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
Namespace = Annotated[
    str | None, typer.Option("-n", "--namespace", help="The context's if not given.")
]
AllRanks = Annotated[bool, typer.Option("--all-ranks", help="Logs of all pods, not of rank 0.")]
Form = Annotated[Output, typer.Option("-o", "--output", help="Form of the result.")]


def _job_names(incomplete: str) -> list[str]:
    from tita.jobspec import job_names

    return [name for name in job_names() if name.startswith(incomplete)]


@app.command()
def launch(
    job: Annotated[str, typer.Argument(help="A job in jobs/.", autocompletion=_job_names)],
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs in total.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes (pods).")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="One key of the recipe, key=value; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with some of the recipe's keys.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; made up if not given.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run as processes on this machine.")
    ] = False,
    store: Annotated[
        str | None, typer.Option(help="With --local: a directory or s3://bucket/prefix.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit, and do not watch.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the Job (-o yaml) and do not submit it.")
    ] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Look before submitting.")
    ] = True,
    queue: Annotated[str | None, typer.Option(help="Kueue's local queue.")] = None,
    image: Annotated[str | None, typer.Option(help="Another image than the release's.")] = None,
    release: Release = None,
    context: Context = None,
    namespace: Namespace = None,
    all_ranks: AllRanks = False,
    output: Form = Output.TABLE,
) -> None:
    """Submit a job and watch it; Ctrl-C lets go of it, and it goes on."""
    from tita.errors import TitaError
    from tita.jobspec import load_job, merge
    from tita.launch.template import check_run_name, new_run_name
    from tita.recipes import RECIPES, load_recipe, parse_overrides, read_recipe_file

    load_job(job)  # a misspelt name is told before anything is asked of a cluster
    laid_over = merge(read_recipe_file(recipe), parse_overrides(overrides or []))
    run = check_run_name(name) if name else new_run_name(job)
    if local:
        if detach or dry_run or queue or image:
            raise TitaError(
                "--local runs here and now",
                remedy="leave out --detach, --dry-run, --queue, --image",
            )
        from tita.settings import settings

        load_recipe(RECIPES[job], laid_over)
        where = store or settings().store
        code = _launch_here(
            job, laid_over, run=run, store=where, gpus=gpus, nodes=nodes or 1, output=output
        )
        raise typer.Exit(code)
    from tita.launch.submit import LaunchRequest

    request = LaunchRequest(
        job=job, run=run, recipe=laid_over, gpus=gpus, nodes=nodes, queue=queue, image=image
    )
    cluster = _connect(context, namespace)
    _submit(cluster, request, release=release, preflight=preflight, dry_run=dry_run, output=output)
    if detach and output is not Output.TABLE:
        emit({"run": run, "job": job, "namespace": cluster.namespace}, output=output)
    if detach or dry_run:
        raise typer.Exit
    from tita.launch.follow import watch_run

    raise typer.Exit(watch_run(cluster, run, output=output, all_ranks=all_ranks))


@app.command()
def doctor(
    release: Release = None,
    context: Context = None,
    namespace: Namespace = None,
    output: Form = Output.TABLE,
) -> None:
    """Check the cluster, the release and the store, without launching anything."""
    from dataclasses import asdict

    from tita.errors import ExitCode
    from tita.launch.doctor import doctor as examine
    from tita.launch.preflight import CheckResult

    findings: list[CheckResult] = []
    good = examine(
        _connect(context, namespace),
        release=release,
        tell=findings.append if output is not Output.TABLE else lambda found: print(found),
    )
    if output is not Output.TABLE:
        emit([asdict(found) for found in findings], output=output)
    raise typer.Exit(0 if good else ExitCode.USER)


@app.command()
def promote(
    run: Annotated[str | None, typer.Argument(help="Name of a run of train-dpo.")] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to the model before.")
    ] = False,
    roll: Annotated[
        bool, typer.Option("--roll/--no-roll", help="Restart the inference Deployment.")
    ] = True,
    store: Annotated[str | None, typer.Option(help="s3://bucket/prefix or a folder.")] = None,
    release: Release = None,
    context: Context = None,
    namespace: Namespace = None,
    output: Form = Output.TABLE,
) -> None:
    """Make a run's reward model the one that inference loads."""
    from tita.errors import TitaError
    from tita.launch.runs import promote as move
    from tita.launch.runs import rollback as move_back
    from tita.storage import open_store

    if (run is None) != rollback:
        raise TitaError("give either a run or --rollback")
    opened = open_store(store)
    pointer = move(opened, run) if run is not None else move_back(opened)
    rolled: list[str] = []
    # A directory on this machine serves no cluster.
    if roll and opened.uri.startswith("s3://"):
        from tita.launch.runs import roll_inference

        try:
            rolled = roll_inference(_connect(context, namespace), release=release)
        except TitaError as error:
            done = f"reward/current is {pointer.target} now, but inference was not restarted"
            error.what = f"{done}: {error.what}"
            raise
    emit({"reward/current": pointer.target, "restarted": ", ".join(rolled)}, output=output)


def _submit(
    cluster: "Cluster",
    request: "LaunchRequest",
    *,
    release: str | None,
    preflight: bool,
    dry_run: bool,
    output: Output,
) -> None:
    from tita.errors import TitaError
    from tita.launch.doctor import examine
    from tita.launch.preflight import CheckResult, CheckStatus
    from tita.launch.submit import find_template, plan, submit

    template = find_template(cluster, request.job, release=release)
    manifest, shape = plan(request, template)

    def tell(finding: CheckResult) -> None:
        if finding.mark is not CheckStatus.OK:
            say(str(finding))

    if dry_run:
        submit(cluster, manifest, dry_run=True)
        emit(manifest, output=Output.YAML if output is Output.TABLE else output)
        return
    if preflight and not examine(cluster, template, manifest, tell=tell):
        raise TitaError("not submitted", remedy="mend the above, or give --no-preflight")
    submit(cluster, manifest)
    size = f"{counted(shape.nodes, 'pod')}, {counted(shape.gpus, 'GPU')}"
    say(f"submitted {request.run} ({size}) to namespace {cluster.namespace}")


def _connect(context: str | None, namespace: str | None) -> "Cluster":
    from tita.launch.cluster import connect

    return connect(context=context, namespace=namespace)


def _launch_here(
    job: str,
    laid_over: dict[str, Any],
    *,
    run: str,
    store: str,
    gpus: int | None,
    nodes: int,
    output: Output,
) -> int:
    from tita.launch.local import launch_local, num_gpus
    from tita.launch.template import JobShape, resolve_shape

    wanted = max(1, gpus if gpus is not None else nodes)
    shape = resolve_shape(JobShape(nodes=1, gpus_per_node=wanted), gpus=wanted, nodes=nodes)
    here = num_gpus()
    if here < wanted:
        say(f"{counted(here, 'GPU')} here; on the CPU {counted(wanted, 'worker')} instead")
    say(f"run {run}, results in {store}; Ctrl-C ends it, and the same --name goes on with it")
    return launch_local(job, recipe=laid_over, run=run, store=store, shape=shape, output=output)
