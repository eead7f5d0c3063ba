"""`tita doctor`, and the preflight of a launch."""

from collections.abc import Callable, Iterable, Mapping
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
from tita.settings import settings
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
    store, in_pods, releases = "", dict[str, str](), dict[str, JobTemplate]()
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
        in_pods = plain_environment(main_container(manifest["spec"]["template"]))
        store = in_pods.get("TITA_STORE", store)
    for name in sorted(releases):
        health = [partial(component_health, cluster, releases[name], part) for part in COMPONENTS]
        good &= _report_all(cluster, run_checks(health), report)
    checks = [_check_store_from_here(store, in_pods)] if store else []
    return good & _report_all(cluster, checks, report)


def _report_all(cluster: Cluster, results: Iterable[CheckResult], report: Report) -> bool:
    good = True
    for result in results:
        report(replace(result, remedy=cluster.scope.fill(result.remedy)))
        good &= result.mark is not BAD
    return good


def _check_store_from_here(uri: str, in_pods: Mapping[str, str]) -> CheckResult:
    """Check the store if this machine has credentials for its server; a laptop often has none.

    Args:
        in_pods: the environment of the release's jobs.
    """
    if uri.startswith("s3://"):
        endpoint_url, here = in_pods.get("TITA_S3_ENDPOINT_URL"), settings()
        if endpoint_url and here.s3_endpoint_url is None:
            # On AWS, a bucket of this name belongs to somebody else.
            text = f"{uri} is on {endpoint_url}, and this machine would look for it on AWS"
            return CheckResult("store", UNKNOWN, text, "set TITA_S3_ENDPOINT_URL to check it")
        for name, value in {
            "TITA_S3_ENCRYPTION": here.s3_encryption,
            "TITA_S3_KMS_KEY_ID": here.s3_kms_key_id or "",
            "TITA_S3_REQUESTER_PAYS": "true" if here.s3_requester_pays else "",
        }.items():
            if (wanted := in_pods.get(name, "")) != value:
                text = f"{uri}: {name} is {wanted or 'unset'} in the release, not on this machine"
                remedy = f"set {name}={wanted} to check it" if wanted else f"unset {name}"
                return CheckResult("store", UNKNOWN, text, remedy)
        from tita.storage.s3_client import has_credentials  # it imports boto3: 0.2 s

        try:
            if not has_credentials():
                return CheckResult("store", UNKNOWN, f"{uri}: no credentials on this machine")
        except TitaError as error:
            return CheckResult("store", BAD, str(error))
    return check_store(uri)
