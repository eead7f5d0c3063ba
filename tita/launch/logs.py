"""The log of a run: from its pods while they exist, else rank 0's log from the store."""

from collections.abc import Sequence

from tita.errors import ExitCode, JobFailed, TitaError
from tita.gang.log_archive import read_logs
from tita.launch.cluster import ApiError, Cluster
from tita.launch.display import LogDisplay, stages_line
from tita.launch.follow import follow_run
from tita.launch.jobs import run_not_found
from tita.launch.objects import (
    JOB_LABEL,
    JOB_NAME,
    Object,
    is_over,
    main_container,
    plain_environment,
    rank_of,
)
from tita.launch.run_state import JOBS, PODS
from tita.launch.watch import read_log
from tita.records import RunStages, TrainProgress, read_record
from tita.settings import settings
from tita.storage import open_store
from tita.terminal import say


def print_logs(cluster: Cluster, run: str, *, all_ranks: bool = False, follow: bool = True) -> int:
    """Print a run's log to standard output, with `follow` until the run is over.

    Where no pod is left, the log of rank 0 is read from the store of the run; where the Job is
    gone, from that of the release.

    Raises:
        TitaError: there is no such run.
        JobFailed: no pod is left, and the store has no log that can be read.
    """
    try:
        job = cluster.get(cluster.path(JOBS, run))
    except ApiError as error:
        if error.status != 404:
            raise
        for store in _stores_of_releases(cluster) or [settings().store]:
            if _print_archived(run, store=store):
                say(f"{run} has no Job any more; this is its log in {store}")
                return ExitCode.OK
        raise run_not_found(cluster, run) from None
    pods, _ = cluster.list(cluster.path(PODS), labelSelector=f"{JOB_NAME}={run}")
    if pods and follow:
        return follow_run(cluster, run, LogDisplay(prefixed=all_ranks), all_ranks=all_ranks)
    if pods:
        return _print_now(cluster, pods, all_ranks=all_ranks)
    if not is_over(job) and follow:
        return follow_run(cluster, run, LogDisplay(prefixed=all_ranks), all_ranks=all_ranks)
    store = plain_environment(main_container(job["spec"]["template"])).get("TITA_STORE", "")
    if not _print_archived(run, store=store):
        scope = cluster.scope.on_store(store)
        status, show = scope.tita("jobs status", run), scope.tita("runs show", run)
        raise JobFailed(
            f"no pod of {run} is left, and no log of it can be read from the store",
            where=f"namespace {cluster.namespace}",
            remedy=f"see `{status}` and `{show}`",
        )
    return ExitCode.OK


def _print_now(cluster: Cluster, pods: Sequence[Object], *, all_ranks: bool) -> int:
    """Print what the pods have written so far, each start of a rank in turn."""
    display = LogDisplay(prefixed=all_ranks)
    for pod in sorted(pods, key=lambda p: (rank_of(p), p["metadata"]["creationTimestamp"])):
        rank, name = rank_of(pod), pod["metadata"]["name"]
        if not (all_ranks or rank == 0):
            continue
        try:
            for text in read_log(cluster, name):
                if (shown := _as_text(text)) is not None:
                    display.line(str(rank), shown)
        except ApiError as error:
            if error.status not in (400, 404):  # not started yet, or just deleted
                raise
            say(f"no log of {name}: {error.what}")
    return ExitCode.OK


def _stores_of_releases(cluster: Cluster) -> list[str]:
    """The stores of the releases in the namespace; empty if there is none or it must not be read.

    The store in the settings may have another run of the same name.
    """
    try:
        cron_jobs, _ = cluster.list(cluster.path("cronjobs.batch"), labelSelector=JOB_LABEL)
    except ApiError:
        return []
    pods = (item["spec"]["jobTemplate"]["spec"]["template"] for item in cron_jobs)
    stores = (plain_environment(main_container(pod)).get("TITA_STORE") for pod in pods)
    return list(dict.fromkeys(filter(None, stores)))


def _print_archived(run: str, *, store: str) -> bool:
    """Print the log of rank 0 that the store keeps; whether there is one that can be read."""
    try:
        lines = list(read_logs(open_store(store), run))
    except TitaError as error:
        say(f"cannot read its log from the store: {error}")
        return False
    for text in lines:
        if (shown := _as_text(text)) is not None:
            print(shown)
    return bool(lines)


def _as_text(line: str) -> str | None:
    """A line of a job's log as `tita jobs logs` prints it; None for a record of progress."""
    record = read_record(line)
    if isinstance(record, RunStages):
        return stages_line(record)
    return None if isinstance(record, TrainProgress) else line
