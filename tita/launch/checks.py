"""All checks in the order in which a person would make them; `tita doctor` and every launch."""

from collections.abc import Callable
from functools import partial

from tita.errors import TitaError
from tita.jobspec import job_names
from tita.launch.cluster import Cluster, Object
from tita.launch.preflight import (
    Check,
    Finding,
    Mark,
    check_api,
    check_job,
    check_rights,
    check_store,
    look_all,
)
from tita.launch.standing import COMPONENTS, STORE, check_standing
from tita.launch.submit import Request, plan
from tita.launch.template import Template, container_of, environment_of, find_template
from tita.terminal import counted

Tell = Callable[[Finding], None]


def examine(cluster: Cluster, template: Template, manifest: Object, *, tell: Tell) -> bool:
    """Whether nothing speaks against this launch; every finding is told."""
    release = Finding(check="release", mark=Mark.OK, text=f"{template.release} ({template.name})")
    first: list[Check] = [
        lambda: check_api(cluster),
        lambda: check_rights(cluster),
        lambda: release,
    ]
    good = True
    store = partial(check_standing, cluster, template.release, STORE)
    for finding in look_all([*first, store, *check_job(cluster, template, manifest)]):
        tell(finding)
        good &= finding.mark is not Mark.BAD
    return good


def doctor(cluster: Cluster, *, release: str | None, tell: Tell) -> bool:
    """Whether all jobs could be launched here, and whether the store does what they need."""
    good = True
    for finding in (check_api(cluster), check_rights(cluster)):
        tell(finding)
        good &= finding.mark is not Mark.BAD
    store, releases = "", set[str]()
    for job in job_names():
        try:
            template = find_template(cluster, job, release=release)
            request = Request(job=job, run=f"doctor-{job}", recipe={})
            manifest, shape = plan(request, template)
        except TitaError as error:
            tell(Finding(check=job, mark=Mark.BAD, text=error.what, remedy=error.remedy or ""))
            good = False
            continue
        size = f"{shape.nodes} x {counted(shape.gpus_per_node, 'GPU')}"
        tell(Finding(check=job, mark=Mark.OK, text=f"{template.name}, {size}"))
        for finding in look_all(check_job(cluster, template, manifest)):
            tell(finding)
            good &= finding.mark is not Mark.BAD
        releases.add(template.release)
        store = environment_of(container_of(manifest["spec"]["template"])).get("TITA_STORE", store)
    for name in sorted(releases):
        for finding in look_all([partial(check_standing, cluster, name, c) for c in COMPONENTS]):
            tell(finding)
            good &= finding.mark is not Mark.BAD
    if store:
        finding = _store(store)
        tell(finding)
        good &= finding.mark is not Mark.BAD
    return good


def _store(uri: str) -> Finding:
    """A laptop often has no credentials for the store: that is no fault of the cluster."""
    if uri.startswith("s3://"):
        import boto3

        if boto3.Session().get_credentials() is None:
            return Finding(
                check="store", mark=Mark.UNKNOWN, text=f"{uri}: no credentials here to look with"
            )
    return check_store(uri)
