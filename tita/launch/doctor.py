"""`tita doctor`, and the preflight of a launch."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from tita.errors import TitaError
from tita.jobspec import job_names
from tita.launch.cluster import Cluster
from tita.launch.component_health import COMPONENTS, EMBEDDED_STORE, component_health
from tita.launch.objects import Object, main_container, plain_environment
from tita.launch.preflight import (
    BAD,
    OK,
    UNKNOWN,
    CheckResult,
    check_api,
    check_data,
    check_job,
    check_rights,
    check_store,
    run_checks,
)
from tita.launch.submit import LaunchRequest, find_template, plan
from tita.launch.template import JobTemplate
from tita.terminal import counted

Report = Callable[[CheckResult], None]


def run_preflight(
    cluster: Cluster, template: JobTemplate, manifest: Object, *, report: Report
) -> bool:
    """Report the checks of one launch; whether none is bad."""
    release = CheckResult("release", OK, f"{template.release} ({template.name})")
    results = run_checks(
        [
            partial(check_api, cluster),
            partial(check_rights, cluster),
            lambda: release,
            partial(component_health, cluster, template, EMBEDDED_STORE),
            *check_job(cluster, template, manifest),
            partial(check_data, manifest),
        ]
    )
    return _report_all(cluster, results, report)


def run_doctor(cluster: Cluster, *, release: str | None, report: Report) -> bool:
    """Report the checks of the cluster, of every job and of the store; whether none is bad."""
    good = _report_all(cluster, (check_api(cluster), check_rights(cluster)), report)
    store, releases = "", dict[str, JobTemplate]()
    for job in job_names():
        try:
            template = find_template(cluster, job, release=release)
            request = LaunchRequest(job=job, run=f"doctor-{job}", recipe={})
            manifest, shape = plan(request, template)
        except TitaError as error:
            report(CheckResult(job, BAD, error.what, error.remedy or ""))
            good = False
            continue
        size = f"{shape.nodes} x {counted(shape.gpus_per_node, 'GPU')}"
        report(CheckResult(job, OK, f"{template.name}, {size}"))
        good &= _report_all(cluster, run_checks(check_job(cluster, template, manifest)), report)
        releases[template.release] = template
        container = main_container(manifest["spec"]["template"])
        store = plain_environment(container).get("TITA_STORE", store)
    for name in sorted(releases):
        health = [partial(component_health, cluster, releases[name], part) for part in COMPONENTS]
        good &= _report_all(cluster, run_checks(health), report)
    return good & _report_all(cluster, [_check_store_from_here(store)] if store else [], report)


def _report_all(cluster: Cluster, results: Iterable[CheckResult], report: Report) -> bool:
    good = True
    for result in results:
        report(replace(result, remedy=cluster.scope.fill(result.remedy)))
        good &= result.mark is not BAD
    return good


def _check_store_from_here(uri: str) -> CheckResult:
    """Check the store if this machine has credentials; a laptop often has none."""
    if uri.startswith("s3://"):
        from tita.storage.s3_client import has_credentials  # it imports boto3: 0.2 s

        try:
            if not has_credentials():
                return CheckResult("store", UNKNOWN, f"{uri}: no credentials on this machine")
        except TitaError as error:
            return CheckResult("store", BAD, str(error))
    return check_store(uri)
