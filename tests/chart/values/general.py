"""Cases of values that concern the whole release."""

from typing import Any

from tests.chart.values.case import (
    SERVING,
    Case,
    Objects,
    env,
    job,
    key_of,
    kinds,
    one,
    server,
    worker,
)

CLOSED = {**SERVING, "networkPolicy.enabled": True}
MONITOR = {**SERVING, "metrics.serviceMonitor.enabled": True}
DASHBOARD = {**SERVING, "metrics.dashboard.enabled": True}


def images(objects: Objects) -> set[str]:
    return {c["image"] for pod in (worker(objects), server(objects)) for c in pod["containers"]}


def allowed(objects: Objects) -> Any:
    (rule,) = one(objects, "NetworkPolicy", "tita-inference")["spec"]["ingress"]
    return rule["from"][1]["namespaceSelector"]["matchExpressions"][0]["values"]


CASES = {
    "nameOverride": Case(
        "vision",
        lambda o: job(o)["metadata"]["labels"]["app.kubernetes.io/name"] == "vision",
        {"fullnameOverride": "tita"},
        alone=True,
    ),
    "fullnameOverride": Case("vision", lambda o: one(o, "Service", "vision-jobs"), alone=True),
    "commonLabels": Case(
        {"team": "vision"},
        lambda o: all(x["metadata"]["labels"].get("team") == "vision" for x in o),
    ),
    "image.registry": Case(
        "registry.example",
        lambda o: images(o) == {"registry.example/tita:0.1.0"},
        SERVING,
        alone=True,
    ),
    "image.repository": Case(
        "lab/tita", lambda o: images(o) == {"lab/tita:0.1.0"}, SERVING, alone=True
    ),
    "image.tag": Case("1.2.3", lambda o: images(o) == {"tita:1.2.3"}, SERVING, alone=True),
    "image.digest": Case(
        f"sha256:{'0' * 64}",
        lambda o: images(o) == {f"tita@sha256:{'0' * 64}"},
        SERVING,
        alone=True,
    ),
    "image.trackers": Case(
        ["trackio"],
        lambda o: job(o)["metadata"]["annotations"]["tita.dev/trackers"] == "trackio",
    ),
    "image.pullPolicy": Case(
        "Always", lambda o: worker(o)["containers"][0]["imagePullPolicy"] == "Always"
    ),
    "imagePullSecrets": Case(
        [{"name": "pull"}], lambda o: worker(o)["imagePullSecrets"] == [{"name": "pull"}]
    ),
    "logLevel": Case("debug", lambda o: env(worker(o))["TITA_LOG_LEVEL"] == "debug"),
    "allowCpu": Case(True, lambda o: env(worker(o))["TITA_ALLOW_CPU"] == "true"),
    "gpuResourceName": Case(
        "amd.com/gpu",
        lambda o: (
            worker(o)["containers"][0]["resources"]["limits"]["amd.com/gpu"] == 1
            and job(o)["metadata"]["annotations"]["tita.dev/gpu-resource"] == "amd.com/gpu"
        ),
    ),
    "podSecurityContext": Case(
        {"runAsUser": 4242}, lambda o: worker(o)["securityContext"]["runAsUser"] == 4242
    ),
    "securityContext": Case(
        {"runAsUser": 4242},
        lambda o: worker(o)["containers"][0]["securityContext"]["runAsUser"] == 4242,
    ),
    "huggingface.existingSecret": Case(
        "hub", lambda o: key_of(worker(o), "HF_TOKEN") == ("hub", "HF_TOKEN")
    ),
    "huggingface.tokenKey": Case(
        "t", lambda o: key_of(worker(o), "HF_TOKEN")[1] == "t", {"huggingface.existingSecret": "h"}
    ),
    "serviceAccount.create": Case(False, lambda o: "ServiceAccount" not in kinds(o), alone=True),
    "serviceAccount.name": Case(
        "mine",
        lambda o: one(o, "ServiceAccount", "mine") and worker(o)["serviceAccountName"] == "mine",
        alone=True,
    ),
    "serviceAccount.annotations": Case(
        {"eks.amazonaws.com/role-arn": "arn"},
        lambda o: (
            one(o, "ServiceAccount", "tita")["metadata"]["annotations"]
            == {"eks.amazonaws.com/role-arn": "arn"}
        ),
    ),
    "rbac.create": Case(False, lambda o: "Role" not in kinds(o), alone=True),
    "rbac.subjects": Case(
        [{"kind": "User", "name": "ada"}],
        lambda o: one(o, "RoleBinding", "tita-launcher")["subjects"][0]["name"] == "ada",
    ),
    "rbac.clusterRole": Case(True, lambda o: one(o, "ClusterRole", "tita:lab:tita:launcher")),
    "networkPolicy.enabled": Case(
        True, lambda o: one(o, "NetworkPolicy", "tita-jobs")["spec"]["ingress"]
    ),
    "networkPolicy.inferenceFrom": Case(
        ["web"], lambda o: allowed(o) == ["web"], CLOSED, alone=True
    ),
    "networkPolicy.metricsFrom": Case(["mon"], lambda o: allowed(o) == ["mon"], CLOSED, alone=True),
    "networkPolicy.egress": Case(
        [{"ports": [{"port": 443}]}],
        lambda o: one(o, "NetworkPolicy", "tita-egress")["spec"]["egress"][-1]["ports"],
        CLOSED,
        alone=True,
    ),
    "metrics.serviceMonitor.enabled": Case(
        True, lambda o: one(o, "ServiceMonitor", "tita-inference"), SERVING
    ),
    "metrics.serviceMonitor.interval": Case(
        "7s",
        lambda o: (
            one(o, "ServiceMonitor", "tita-inference")["spec"]["endpoints"][0]["interval"] == "7s"
        ),
        MONITOR,
    ),
    "metrics.serviceMonitor.labels": Case(
        {"a": "b"},
        lambda o: one(o, "ServiceMonitor", "tita-inference")["metadata"]["labels"]["a"] == "b",
        MONITOR,
    ),
    "metrics.dashboard.enabled": Case(
        True, lambda o: one(o, "ConfigMap", "tita-inference-dashboard"), SERVING
    ),
    "metrics.dashboard.labels": Case(
        {"a": "b"},
        lambda o: one(o, "ConfigMap", "tita-inference-dashboard")["metadata"]["labels"]["a"] == "b",
        DASHBOARD,
    ),
    "tests.enabled": Case(False, lambda o: "Pod" not in kinds(o), alone=True),
}
