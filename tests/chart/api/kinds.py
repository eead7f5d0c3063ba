"""API discovery: the kinds that the server supports."""

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind that the server supports."""

    version: str
    kind: str
    plural: str
    namespaced: bool = True


KINDS = [
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Event", "events"),
    Kind("v1", "Namespace", "namespaces", False),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    Kind("v1", "Pod", "pods"),
    Kind("v1", "Secret", "secrets"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    Kind("batch/v1", "CronJob", "cronjobs"),
    Kind("batch/v1", "Job", "jobs"),
    Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes"),
    Kind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects"),
    Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors"),
    Kind("networking.k8s.io/v1", "Ingress", "ingresses"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", False),
    Kind("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", False),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    Kind("storage.k8s.io/v1", "StorageClass", "storageclasses", False),
]
SCALE = {"kind": "Scale", "group": "autoscaling", "version": "v1"}


def discovery(path: str, *, server_version: str) -> dict[str, Any] | None:
    """Return the discovery document at `path`; None for other paths."""
    groups = sorted({k.version for k in KINDS if "/" in k.version})
    if path == "/version":
        major, minor = server_version.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{server_version}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": g, "version": g.split("/")[1]} for g in groups]
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [
                {
                    "name": v["groupVersion"].split("/")[0],
                    "versions": [v],
                    "preferredVersion": v,
                }
                for v in versions
            ],
        }
    version = path.removeprefix("/apis/").removeprefix("/api/")
    kinds = [k for k in KINDS if k.version == version]
    if not kinds:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": [
            {
                "name": k.plural,
                "singularName": k.kind.lower(),
                "namespaced": k.namespaced,
                "kind": k.kind,
                "verbs": verbs,
                "shortNames": ["pvc"] if k.kind == "PersistentVolumeClaim" else [],
            }
            for k in kinds
        ]
        + [
            {"name": f"{k.plural}/scale", "singularName": "", "namespaced": True, **SCALE,
             "verbs": ["get", "patch"]}
            for k in kinds
            if k.kind in ("Deployment", "StatefulSet")
        ],
    }  # fmt: skip
