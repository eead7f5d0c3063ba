"""Cases of values that `jobs` and `inference` share."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.chart.values.case import Case, Object, Objects, env, volume

TOLERATION = [{"key": "spot", "operator": "Exists"}]
AFFINITY = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
SPREAD = [
    {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway",
     "labelSelector": {"matchLabels": {"a": "b"}}},
]  # fmt: skip
EXTRA = [{"name": "A", "value": "b"}]
EXTRA_VOLUME = [{"name": "ca", "configMap": {"name": "ca"}}]
EXTRA_MOUNT = [{"name": "tmp", "mountPath": "/extra"}]
RESOURCES = {"requests": {"cpu": "9", "memory": "9Gi"}, "limits": {"memory": "99Gi"}}


def shared_cases(
    part: str, pod: Callable[[Objects], Object], given: Mapping[str, Any]
) -> dict[str, Case]:
    """Return the cases for `part`, which inspect the pod that `pod` looks up."""
    values: dict[str, Case] = {
        "shmSize": Case("3Gi", lambda o: volume(pod(o), "shm")["emptyDir"]["sizeLimit"] == "3Gi"),
        "resources": Case(
            RESOURCES, lambda o: pod(o)["containers"][0]["resources"]["requests"]["cpu"] == "9"
        ),
        "cache.size": Case(
            "7Gi", lambda o: volume(pod(o), "cache")["emptyDir"]["sizeLimit"] == "7Gi"
        ),
        "terminationGracePeriodSeconds": Case(
            999, lambda o: pod(o)["terminationGracePeriodSeconds"] == 999
        ),
        "extraEnv": Case(EXTRA, lambda o: env(pod(o))["A"] == "b"),
        "extraEnvFrom": Case(
            [{"configMapRef": {"name": "c"}}],
            lambda o: pod(o)["containers"][0]["envFrom"] == [{"configMapRef": {"name": "c"}}],
        ),
        "extraVolumes": Case(EXTRA_VOLUME, lambda o: volume(pod(o), "ca") == EXTRA_VOLUME[0]),
        "extraVolumeMounts": Case(
            EXTRA_MOUNT, lambda o: EXTRA_MOUNT[0] in pod(o)["containers"][0]["volumeMounts"]
        ),
        "nodeSelector": Case({"gpu": "h100"}, lambda o: pod(o)["nodeSelector"] == {"gpu": "h100"}),
        "tolerations": Case(TOLERATION, lambda o: pod(o)["tolerations"] == TOLERATION),
        "affinity": Case(AFFINITY, lambda o: pod(o)["affinity"] == AFFINITY),
        "topologySpreadConstraints": Case(
            SPREAD, lambda o: pod(o)["topologySpreadConstraints"] == SPREAD
        ),
        "priorityClassName": Case("high", lambda o: pod(o)["priorityClassName"] == "high"),
        "runtimeClassName": Case("nvidia", lambda o: pod(o)["runtimeClassName"] == "nvidia"),
        "schedulerName": Case("volcano", lambda o: pod(o)["schedulerName"] == "volcano"),
    }
    return {f"{part}.{key}": case._replace(given=given) for key, case in values.items()}
