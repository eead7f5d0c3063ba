"""From a launch request to a Job in the cluster."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tita.errors import TitaError
from tita.jobspec import chart_path, load_job
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import INSTANCE_LABEL, JOB_LABEL, LAUNCH_ID, Object
from tita.launch.remedies import remedy_for
from tita.launch.template import JobShape, JobTemplate, make_job, resolve_shape
from tita.recipe_sources import format_overrides
from tita.recipes import RECIPES, TrainRecipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """What the user sets on top of the release's template."""

    job: str
    run: str
    recipe: Mapping[str, Any]
    gpus: int | None = None
    nodes: int | None = None
    queue: str | None = None
    image: str | None = None
    release: str | None = None
    gang_timeout: int | None = None
    """Seconds that the nodes wait for each other before the run ends and frees its GPUs."""
    preflight: bool = True
    """Whether the cluster is checked first."""

    def options(self) -> list[str]:
        """The options of `tita launch` that submit the same run again."""
        found = []
        for option in ("gpus", "nodes", "queue", "image", "release", "gang-timeout"):
            if (value := getattr(self, option.replace("-", "_"))) is not None:
                found += [f"--{option}", str(value)]
        for override in format_overrides(self.recipe):
            found += ["--set", override]
        return found if self.preflight else [*found, "--no-preflight"]


def find_template(cluster: Cluster, job: str, *, release: str | None = None) -> JobTemplate:
    """The chart's CronJob of `job`.

    Raises:
        TitaError: there is none, or there are several and `release` is not given.
    """

    def find(selector: str) -> list[Object]:
        return cluster.list(cluster.path("cronjobs.batch"), labelSelector=selector)[0]

    found = find(f"{JOB_LABEL}={job}" + (f",{INSTANCE_LABEL}={release}" if release else ""))
    if len(found) == 1:
        return JobTemplate(cron_job=found[0])
    what = f"{len(found)} releases have a job {job!r}"
    if not found:
        what = f"no release {f'{release!r} ' if release else ''}of the tita chart has a job {job!r}"
        found = find(f"{JOB_LABEL}={job}")
    names = sorted(item["metadata"]["labels"].get(INSTANCE_LABEL, "?") for item in found)
    remedy = f"set --release {' or --release '.join(names)}"
    if not names:
        install = cluster.scope.helm(
            "install", "tita", chart_path(), "--set", "s3.bucket=my-bucket"
        )
        remedy = f"set --namespace, or install one: `{install}`"
    raise TitaError(what, where=f"namespace {cluster.namespace}", remedy=remedy)


def plan(request: LaunchRequest, template: JobTemplate) -> tuple[Object, JobShape]:
    """The Job to create and its shape.

    Raises:
        TitaError: the GPUs do not divide over the nodes, the job does not run on several, or the
            recipe is invalid.
    """
    shape = resolve_shape(
        template.shape,
        gpus=request.gpus,
        nodes=request.nodes,
        one_node=load_job(request.job).one_node,
    )
    # The recipe as the pod will load it: the job's, the release's, this run's.
    recipe = load_recipe(RECIPES[request.job], template.recipe, request.recipe)
    # Of another image only its pods know.
    if request.image is None and isinstance(recipe, TrainRecipe) and template.trackers is not None:
        _check_trackers(recipe.report_to, installed=template.trackers)
    manifest = make_job(
        template,
        run=request.run,
        shape=shape,
        recipe=request.recipe,
        launch_id=secrets.token_hex(8),
        queue=request.queue,
        image=request.image,
        gang_timeout=request.gang_timeout,
        options=request.options(),
    )
    return manifest, shape


def _check_trackers(names: Sequence[str], *, installed: Sequence[str]) -> None:
    missing = [name for name in names if name not in installed]
    if missing:
        raise TitaError(
            f"the release's image has no {', '.join(missing)}",
            where="report_to",
            remedy=f"choose of {', '.join(installed) or 'none'}; or build an image with it and "
            "name it in the chart's image.trackers",
        )


def submit(cluster: Cluster, manifest: Object, *, dry_run: bool = False) -> Object:
    """Create the Job; with `dry_run` the API validates it only.

    Raises:
        TitaError: the name is taken, or the API refuses the Job.
    """
    path, name = cluster.path("jobs.batch"), manifest["metadata"]["name"]
    try:
        return cluster.create(path, manifest, **({"dryRun": "All"} if dry_run else {}))
    except ApiError as error:
        if error.status == 409 and error.reason == "AlreadyExists":
            existing = cluster.get(cluster.path("jobs.batch", name))
            annotations = existing["metadata"].get("annotations") or {}
            # The response to an earlier attempt was lost: this is our Job.
            if annotations.get(LAUNCH_ID) == manifest["metadata"]["annotations"][LAUNCH_ID]:
                return existing
            if existing["metadata"].get("deletionTimestamp"):
                jobs = cluster.scope.tita("jobs list")
                raise TitaError(
                    f"run {name!r} is being deleted: its pods are still terminating",
                    remedy=f"launch again when `{jobs}` no longer shows it",
                ) from None
            raise TitaError(
                f"run {name!r} already exists",
                remedy=f"choose another --name, or {cluster.scope.tita('jobs delete', name)}",
            ) from None
        remedy = error.remedy or cluster.scope.fill(remedy_for(error.what)) or None
        raise TitaError(error.what, where=f"job {name}", remedy=remedy) from None
