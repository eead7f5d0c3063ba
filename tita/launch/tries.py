"""How many of its tries a run has used, counted from its pods as the run itself counts.

`tita.gang.attempts` counts from the run's record in the store, which launchers often cannot read.
"""

from collections.abc import Iterable

from tita.errors import IGNORED, ExitCode
from tita.gang.incidents import Incident, NodeEnd, find_incidents
from tita.launch.objects import (
    Object,
    condition,
    epoch,
    has_failed,
    main_container,
    plain_environment,
    rank_of,
    terminated,
)

_LOST_REASONS = frozenset({"ContainerStatusUnknown", "NodeLost"})


def allowed_tries(job: Object) -> int:
    """Incidents after which the run starts again; one more ends it."""
    template = job["spec"].get("template")
    variables = plain_environment(main_container(template)) if template else {}
    # Releases of older charts do not count incidents.
    return int(variables.get("TITA_TRIES", job["spec"].get("backoffLimit", 0)))


def incidents_of(pods: Iterable[Object]) -> list[Incident]:
    """The incidents of a run, oldest first, from all of its pods."""
    return find_incidents(_node_end(pod) for pod in pods if has_failed(pod))


def describe_tries(incidents: list[Incident], *, allowed: int) -> str:
    """The tries that are used, as the watch shows them after an incident."""
    used = sum(incident.is_try for incident in incidents)
    if incidents and not incidents[-1].is_try:
        return f"not counted; {used} of {allowed} tries used" if used else "not counted"
    return f"{used} of {allowed} tries used"


def is_counted_by_job(pod: Object) -> bool:
    """Whether the Job counts this pod's failure against its back-off limit."""
    code = (terminated(pod) or {}).get("exitCode")
    return has_failed(pod) and not (condition(pod, "DisruptionTarget") or code in IGNORED)


def ended_at_s(pod: Object) -> float:
    """When the pod ended for the Job controller, in seconds since 1970; 0 if unknown.

    The end of a pod on a lost node is unknown: it counts from when the node stopped reporting.
    """
    stamp = (terminated(pod) or {}).get("finishedAt")
    if stamp is None and has_failed(pod):
        conditions = (pod.get("status") or {}).get("conditions") or []
        ready = (c.get("lastTransitionTime") for c in conditions if c["type"] == "Ready")
        stamp = next(ready, None)
    return epoch(stamp) if stamp else 0.0


def _node_end(pod: Object) -> NodeEnd:
    created = pod["metadata"].get("creationTimestamp")
    started = epoch(created) if created else 0.0
    return NodeEnd(
        node=rank_of(pod),
        started=started,
        # Times have a resolution of one second.
        ended=max(ended_at_s(pod), started + 1.0),
        code=_code(pod),
    )


def _code(pod: Object) -> int | None:
    """The pod's exit code; None if it was lost with its node, drained, preempted or evicted."""
    status, ended = pod.get("status") or {}, terminated(pod)
    reasons = {status.get("reason"), (ended or {}).get("reason")}
    if condition(pod, "DisruptionTarget") or reasons & _LOST_REASONS or ended is None:
        return None
    # A pod that failed although its container did not: the kubelet rejected or evicted it.
    return int(ended["exitCode"]) or int(ExitCode.FAILED)
