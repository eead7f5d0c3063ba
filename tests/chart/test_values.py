"""One test per value: it does what its comment says, and without it that is not so."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

Object = dict[str, Any]
Objects = list[Object]


class Case(NamedTuple):
    """Setting a value makes `holds` true of the rendered objects, which it was not before."""

    value: Any
    holds: Callable[[Objects], Any]
    given: Mapping[str, Any] = {}


def one(objects: Objects, kind: str, name: str) -> Object:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


def job(objects: Objects, name: str = "train-dpo") -> Object:
    return one(objects, "CronJob", f"tita-{name}")


def jobspec(objects: Objects, name: str = "train-dpo") -> Object:
    spec: Object = job(objects, name)["spec"]["jobTemplate"]["spec"]
    return spec


def worker(objects: Objects, name: str = "train-dpo") -> Object:
    spec: Object = jobspec(objects, name)["template"]["spec"]
    return spec


def server(objects: Objects) -> Object:
    spec: Object = one(objects, "Deployment", "tita-inference")["spec"]["template"]["spec"]
    return spec


def embedded(objects: Objects) -> Object:
    spec: Object = one(objects, "StatefulSet", "tita-s3")["spec"]["template"]["spec"]
    return spec


def env(pod: Object) -> Object:
    entries = pod["containers"][0]["env"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in entries}


def key_of(pod: Object, name: str) -> tuple[str, str]:
    reference = env(pod)[name]["secretKeyRef"]
    return reference["name"], reference["key"]


def volume(pod: Object, name: str) -> Object:
    return next(v for v in pod["volumes"] if v["name"] == name)


def kinds(objects: Objects) -> set[str]:
    return {o["kind"] for o in objects}


def images(objects: Objects) -> set[str]:
    return {c["image"] for pod in (worker(objects), server(objects)) for c in pod["containers"]}


SERVING = {"inference.enabled": True}
EMBEDDED = {"s3.embedded.enabled": True, "s3.bucket": ""}
SECRET = {"s3.existingSecret": "keys"}
SCALING = {**SERVING, "inference.autoscaling.enabled": True}
KEDA = {**SCALING, "inference.autoscaling.kind": "keda"}
INGRESS = {
    **SERVING,
    "inference.ingress.enabled": True,
    "inference.ingress.hosts": [{"host": "a.example"}],
}
ROUTE = {
    **SERVING,
    "inference.httpRoute.enabled": True,
    "inference.httpRoute.parentRefs": [{"name": "gateway"}],
}
CLAIM = {**SERVING, "inference.cache.persistence.enabled": True}
CLOSED = {**SERVING, "networkPolicy.enabled": True}
MONITOR = {**SERVING, "metrics.serviceMonitor.enabled": True}
DASHBOARD = {**SERVING, "metrics.dashboard.enabled": True}

TOLERATION = [{"key": "spot", "operator": "Exists"}]
AFFINITY = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
SPREAD = [
    {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"},
]
EXTRA = [{"name": "A", "value": "b"}]
EXTRA_VOLUME = [{"name": "ca", "configMap": {"name": "ca"}}]
EXTRA_MOUNT = [{"name": "tmp", "mountPath": "/extra"}]
RESOURCES = {"requests": {"cpu": "9", "memory": "9Gi"}, "limits": {"memory": "99Gi"}}


def placed(part: str, pod: Callable[[Objects], Object], given: Mapping[str, Any]) -> dict:  # type: ignore[type-arg]
    """The values that jobs and inference share, of which each means the same for both."""
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


GENERAL = {
    "nameOverride": Case(
        "vision",
        lambda o: job(o)["metadata"]["labels"]["app.kubernetes.io/name"] == "vision",
        {"fullnameOverride": "tita"},
    ),
    "fullnameOverride": Case("vision", lambda o: one(o, "Service", "vision-jobs")),
    "commonLabels": Case(
        {"team": "vision"},
        lambda o: all(x["metadata"]["labels"].get("team") == "vision" for x in o),
    ),
    "image.registry": Case(
        "registry.example", lambda o: images(o) == {"registry.example/tita:0.1.0"}, SERVING
    ),
    "image.repository": Case("lab/tita", lambda o: images(o) == {"lab/tita:0.1.0"}, SERVING),
    "image.tag": Case("1.2.3", lambda o: images(o) == {"tita:1.2.3"}, SERVING),
    "image.digest": Case(
        f"sha256:{'0' * 64}", lambda o: images(o) == {f"tita@sha256:{'0' * 64}"}, SERVING
    ),
    "image.pullPolicy": Case(
        "Always", lambda o: worker(o)["containers"][0]["imagePullPolicy"] == "Always"
    ),
    "imagePullSecrets": Case(
        [{"name": "pull"}], lambda o: worker(o)["imagePullSecrets"] == [{"name": "pull"}]
    ),
    "logLevel": Case("debug", lambda o: env(worker(o))["TITA_LOG_LEVEL"] == "debug"),
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
    "serviceAccount.create": Case(False, lambda o: "ServiceAccount" not in kinds(o)),
    "serviceAccount.name": Case(
        "mine",
        lambda o: one(o, "ServiceAccount", "mine") and worker(o)["serviceAccountName"] == "mine",
    ),
    "serviceAccount.annotations": Case(
        {"eks.amazonaws.com/role-arn": "arn"},
        lambda o: (
            one(o, "ServiceAccount", "tita")["metadata"]["annotations"]
            == {"eks.amazonaws.com/role-arn": "arn"}
        ),
    ),
    "rbac.create": Case(False, lambda o: "Role" not in kinds(o)),
    "rbac.subjects": Case(
        [{"kind": "User", "name": "ada"}],
        lambda o: one(o, "RoleBinding", "tita-launcher")["subjects"][0]["name"] == "ada",
    ),
    "rbac.clusterRole": Case(True, lambda o: one(o, "ClusterRole", "lab-tita-launcher")),
    "networkPolicy.enabled": Case(
        True, lambda o: one(o, "NetworkPolicy", "tita-jobs")["spec"]["ingress"]
    ),
    "networkPolicy.inferenceFrom": Case(["web"], lambda o: allowed(o) == ["web"], CLOSED),
    "networkPolicy.metricsFrom": Case(["mon"], lambda o: allowed(o) == ["mon"], CLOSED),
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
    "tests.enabled": Case(False, lambda o: "Pod" not in kinds(o)),
}


def allowed(objects: Objects) -> Any:
    (rule,) = one(objects, "NetworkPolicy", "tita-inference")["spec"]["ingress"]
    return rule["from"][1]["namespaceSelector"]["matchExpressions"][0]["values"]


S3 = {
    "s3.bucket": Case("other", lambda o: env(worker(o))["TITA_STORE"] == "s3://other"),
    "s3.prefix": Case("/a/b/", lambda o: env(worker(o))["TITA_STORE"] == "s3://my-bucket/a/b"),
    "s3.endpoint": Case(
        "https://s3.example",
        lambda o: env(worker(o))["TITA_S3_ENDPOINT_URL"].endswith("s3.example"),
    ),
    "s3.region": Case("eu-1", lambda o: env(worker(o))["TITA_S3_REGION"] == "eu-1"),
    "s3.pathStyle": Case(True, lambda o: env(worker(o))["TITA_S3_PATH_STYLE"] == "true"),
    "s3.existingSecret": Case(
        "keys",
        lambda o: all(
            key_of(pod, name) == ("keys", name)
            for pod in (worker(o), server(o))
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        ),
        SERVING,
    ),
    "s3.secretKeys.accessKeyId": Case(
        "id", lambda o: key_of(worker(o), "AWS_ACCESS_KEY_ID")[1] == "id", SECRET
    ),
    "s3.secretKeys.secretAccessKey": Case(
        "key", lambda o: key_of(worker(o), "AWS_SECRET_ACCESS_KEY")[1] == "key", SECRET
    ),
    "s3.secretKeys.sessionToken": Case(
        "token", lambda o: key_of(worker(o), "AWS_SESSION_TOKEN")[1] == "token", SECRET
    ),
    "s3.embedded.enabled": Case(
        True,
        lambda o: (
            embedded(o)
            and env(worker(o))["TITA_S3_ENDPOINT_URL"] == "http://tita-s3:8333"
            and key_of(worker(o), "AWS_ACCESS_KEY_ID")[0] == "tita-s3"
        ),
    ),
    "s3.embedded.image.repository": Case(
        "weed", lambda o: embedded(o)["containers"][0]["image"] == "weed:4.48", EMBEDDED
    ),
    "s3.embedded.image.tag": Case(
        "9", lambda o: embedded(o)["containers"][0]["image"].endswith("seaweedfs:9"), EMBEDDED
    ),
    "s3.embedded.image.digest": Case(
        f"sha256:{'1' * 64}",
        lambda o: embedded(o)["containers"][0]["image"].endswith(f"@sha256:{'1' * 64}"),
        EMBEDDED,
    ),
    "s3.embedded.persistence.enabled": Case(
        False, lambda o: volume(embedded(o), "data") == {"name": "data", "emptyDir": {}}, EMBEDDED
    ),
    "s3.embedded.persistence.storageClass": Case(
        "fast",
        lambda o: one(o, "PersistentVolumeClaim", "tita-s3")["spec"]["storageClassName"] == "fast",
        EMBEDDED,
    ),
    "s3.embedded.persistence.size": Case(
        "7Gi", lambda o: claim_size(o, "tita-s3") == "7Gi", EMBEDDED
    ),
    "s3.embedded.resources": Case(
        RESOURCES,
        lambda o: embedded(o)["containers"][0]["resources"]["requests"]["cpu"] == "9",
        EMBEDDED,
    ),
}


def claim_size(objects: Objects, name: str) -> Any:
    spec = one(objects, "PersistentVolumeClaim", name)["spec"]
    return spec["resources"]["requests"]["storage"]


JOBS = {
    "jobs.scratch.storageClass": Case(
        "fast",
        lambda o: (
            volume(worker(o), "scratch")["ephemeral"]["volumeClaimTemplate"]["spec"]
            == {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": "fast",
                "resources": {"requests": {"storage": "200Gi"}},
            }
        ),
    ),
    "jobs.scratch.size": Case(
        "7Gi", lambda o: volume(worker(o), "scratch")["emptyDir"]["sizeLimit"] == "7Gi"
    ),
    "jobs.cache.storageClass": Case(
        "fast", lambda o: volume(worker(o), "cache")["ephemeral"], {"jobs.cache.size": "7Gi"}
    ),
    "jobs.cache.existingClaim": Case(
        "models",
        lambda o: volume(worker(o), "cache")["persistentVolumeClaim"] == {"claimName": "models"},
    ),
    "jobs.rdma.enabled": Case(
        True, lambda o: rdma(o) == 1 and "rdma" not in str(worker(o, "benchmark"))
    ),
    "jobs.rdma.resourceName": Case(
        "rdma/ib",
        lambda o: worker(o)["containers"][0]["resources"]["limits"]["rdma/ib"] == 1,
        {"jobs.rdma.enabled": True},
    ),
    "jobs.rdma.count": Case(4, lambda o: rdma(o) == 4, {"jobs.rdma.enabled": True}),
    "jobs.kueue.queueName": Case(
        "gpus",
        lambda o: (
            job(o)["spec"]["jobTemplate"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
            == "gpus"
            and jobspec(o)["suspend"] is True
        ),
    ),
    "jobs.kueue.suspend": Case(
        False, lambda o: "suspend" not in jobspec(o), {"jobs.kueue.queueName": "gpus"}
    ),
    "jobs.suspend": Case(True, lambda o: job(o, "benchmark")["spec"]["suspend"], SERVING),
    "jobs.timeZone": Case(
        "Europe/Berlin", lambda o: job(o, "benchmark")["spec"]["timeZone"] == "Europe/Berlin"
    ),
    "jobs.ttlSecondsAfterFinished": Case(60, lambda o: jobspec(o)["ttlSecondsAfterFinished"] == 60),
    "jobs.historyLimit": Case(
        1,
        lambda o: (
            job(o)["spec"]["successfulJobsHistoryLimit"] == 1
            and job(o)["spec"]["failedJobsHistoryLimit"] == 1
        ),
    ),
    "jobs.labels": Case(
        {"a": "b"}, lambda o: job(o)["spec"]["jobTemplate"]["metadata"]["labels"]["a"] == "b"
    ),
    "jobs.podLabels": Case(
        {"a": "b"}, lambda o: jobspec(o)["template"]["metadata"]["labels"]["a"] == "b"
    ),
    "jobs.podAnnotations": Case(
        {"a": "b"}, lambda o: jobspec(o)["template"]["metadata"]["annotations"] == {"a": "b"}
    ),
    "jobs.perJob": Case(
        {"train-dpo": {"nodes": 2}},
        lambda o: jobspec(o)["completions"] == 2 and jobspec(o, "build-pairs")["completions"] == 1,
    ),
}


def rdma(objects: Objects) -> Any:
    limits = worker(objects)["containers"][0]["resources"]["limits"]
    return limits["rdma/hca_shared_devices_a"]


def argument(objects: Objects, name: str) -> str:
    arguments = server(objects)["containers"][0]["args"]
    return next(a.partition("=")[2] for a in arguments if a.startswith(f"--{name}="))


def probe(objects: Objects, name: str) -> Object:
    found: Object = server(objects)["containers"][0][name]
    return found


def scaler(objects: Objects) -> Object:
    spec: Object = one(objects, "HorizontalPodAutoscaler", "tita-inference")["spec"]
    return spec


def trigger(objects: Objects) -> Object:
    (found,) = one(objects, "ScaledObject", "tita-inference")["spec"]["triggers"]
    metadata: Object = found["metadata"]
    return metadata


def deployment(objects: Objects) -> Object:
    return one(objects, "Deployment", "tita-inference")


def ingress(objects: Objects) -> Object:
    return one(objects, "Ingress", "tita-inference")


def http_route(objects: Objects) -> Object:
    return one(objects, "HTTPRoute", "tita-inference")


def service(objects: Objects) -> Object:
    return one(objects, "Service", "tita-inference")


INFERENCE = {
    "inference.enabled": Case(True, lambda o: server(o) and service(o)),
    "inference.base": Case("llava", lambda o: argument(o, "base") == "llava"),
    "inference.reward": Case("", lambda o: "--reward" not in str(server(o))),
    "inference.weight": Case(
        0.7,
        lambda o: (
            argument(o, "weight") == "0.7"
            and '"weights":[0,0.7]' in env(worker(o, "benchmark"))["TITA_RECIPE"]
        ),
    ),
    "inference.modelName": Case(
        "lab",
        lambda o: (
            argument(o, "name") == "lab"
            and '"model":"lab"' in env(worker(o, "benchmark"))["TITA_RECIPE"]
        ),
    ),
    "inference.extraArgs": Case(
        ["--x=y"], lambda o: server(o)["containers"][0]["args"][-1] == "--x=y"
    ),
    "inference.replicaCount": Case(3, lambda o: deployment(o)["spec"]["replicas"] == 3),
    "inference.gpus": Case(
        0, lambda o: "nvidia.com/gpu" not in server(o)["containers"][0]["resources"]["limits"]
    ),
    "inference.cache.persistence.enabled": Case(
        True,
        lambda o: (
            volume(server(o), "cache")["persistentVolumeClaim"]["claimName"]
            == one(o, "PersistentVolumeClaim", "tita-inference-cache")["metadata"]["name"]
        ),
    ),
    "inference.cache.persistence.existingClaim": Case(
        "mine",
        lambda o: (
            volume(server(o), "cache")["persistentVolumeClaim"]["claimName"] == "mine"
            and "PersistentVolumeClaim" not in kinds(o)
        ),
        CLAIM,
    ),
    "inference.cache.persistence.storageClass": Case(
        "nfs",
        lambda o: (
            one(o, "PersistentVolumeClaim", "tita-inference-cache")["spec"]["storageClassName"]
            == "nfs"
        ),
        CLAIM,
    ),
    "inference.cache.persistence.accessModes": Case(
        ["ReadWriteOnce"],
        lambda o: (
            one(o, "PersistentVolumeClaim", "tita-inference-cache")["spec"]["accessModes"]
            == ["ReadWriteOnce"]
        ),
        CLAIM,
    ),
    "inference.cache.persistence.size": Case(
        "7Gi", lambda o: claim_size(o, "tita-inference-cache") == "7Gi", CLAIM
    ),
    "inference.auth.existingSecret": Case(
        "keys",
        lambda o: all(
            key_of(pod, "TITA_API_KEYS") == ("keys", "api-keys")
            for pod in (server(o), worker(o, "benchmark"), one(o, "Pod", "tita-test")["spec"])
        ),
    ),
    "inference.auth.secretKey": Case(
        "k",
        lambda o: key_of(server(o), "TITA_API_KEYS") == ("keys", "k"),
        {**SERVING, "inference.auth.existingSecret": "keys"},
    ),
    "inference.service.type": Case(
        "LoadBalancer", lambda o: service(o)["spec"]["type"] == "LoadBalancer"
    ),
    "inference.service.port": Case(
        80,
        lambda o: (
            service(o)["spec"]["ports"][0]["port"] == 80
            and "http://tita-inference:80/v1" in env(worker(o, "benchmark"))["TITA_RECIPE"]
            and env(one(o, "Pod", "tita-test")["spec"])["BASE_URL"] == "http://tita-inference:80/v1"
        ),
    ),
    "inference.service.annotations": Case(
        {"a": "b"}, lambda o: service(o)["metadata"]["annotations"] == {"a": "b"}
    ),
    "inference.ingress.enabled": Case(
        True, ingress, {**SERVING, "inference.ingress.hosts": [{"host": "a.example"}]}
    ),
    "inference.ingress.className": Case(
        "nginx", lambda o: ingress(o)["spec"]["ingressClassName"] == "nginx", INGRESS
    ),
    "inference.ingress.annotations": Case(
        {"a": "b"}, lambda o: ingress(o)["metadata"]["annotations"] == {"a": "b"}, INGRESS
    ),
    "inference.ingress.hosts": Case(
        [{"host": "b.example", "paths": [{"path": "/v1", "pathType": "Exact"}]}],
        lambda o: ingress(o)["spec"]["rules"][0]["http"]["paths"][0]["pathType"] == "Exact",
        INGRESS,
    ),
    "inference.ingress.tls": Case(
        [{"secretName": "t", "hosts": ["a.example"]}],
        lambda o: ingress(o)["spec"]["tls"][0]["secretName"] == "t",
        INGRESS,
    ),
    "inference.httpRoute.enabled": Case(
        True, http_route, {**SERVING, "inference.httpRoute.parentRefs": [{"name": "g"}]}
    ),
    "inference.httpRoute.annotations": Case(
        {"a": "b"}, lambda o: http_route(o)["metadata"]["annotations"] == {"a": "b"}, ROUTE
    ),
    "inference.httpRoute.parentRefs": Case(
        [{"name": "other"}],
        lambda o: http_route(o)["spec"]["parentRefs"] == [{"name": "other"}],
        ROUTE,
    ),
    "inference.httpRoute.hostnames": Case(
        ["a.example"], lambda o: http_route(o)["spec"]["hostnames"] == ["a.example"], ROUTE
    ),
    "inference.autoscaling.enabled": Case(
        True, lambda o: scaler(o) and "replicas" not in deployment(o)["spec"]
    ),
    "inference.autoscaling.kind": Case("keda", trigger, SCALING),
    "inference.autoscaling.minReplicas": Case(2, lambda o: scaler(o)["minReplicas"] == 2, SCALING),
    "inference.autoscaling.maxReplicas": Case(9, lambda o: scaler(o)["maxReplicas"] == 9, SCALING),
    "inference.autoscaling.targetWaitingRequests": Case(
        7,
        lambda o: (
            scaler(o)["metrics"][0]["pods"]["target"]
            == {"type": "AverageValue", "averageValue": "7"}
        ),
        SCALING,
    ),
    "inference.autoscaling.metricName": Case(
        "waiting",
        lambda o: scaler(o)["metrics"][0]["pods"]["metric"]["name"] == "waiting",
        SCALING,
    ),
    "inference.autoscaling.targetCPUUtilizationPercentage": Case(
        80,
        lambda o: scaler(o)["metrics"][1]["resource"]["target"]["averageUtilization"] == 80,
        SCALING,
    ),
    "inference.autoscaling.prometheusAddress": Case(
        "http://prom:9090", lambda o: trigger(o)["serverAddress"] == "http://prom:9090", KEDA
    ),
    "inference.autoscaling.scaleDownStabilizationSeconds": Case(
        60,
        lambda o: scaler(o)["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 60,
        SCALING,
    ),
    "inference.podDisruptionBudget.enabled": Case(
        False, lambda o: server(o) and "PodDisruptionBudget" not in kinds(o)
    ),
    "inference.podDisruptionBudget.maxUnavailable": Case(
        "50%",
        lambda o: (
            one(o, "PodDisruptionBudget", "tita-inference")["spec"]["maxUnavailable"] == "50%"
        ),
    ),
    "inference.startupProbe.periodSeconds": Case(
        7, lambda o: probe(o, "startupProbe")["periodSeconds"] == 7
    ),
    "inference.startupProbe.failureThreshold": Case(
        1000,
        lambda o: (
            probe(o, "startupProbe")["failureThreshold"] == 1000
            and deployment(o)["spec"]["progressDeadlineSeconds"] > 5000
        ),
    ),
    "inference.readinessProbe.periodSeconds": Case(
        7, lambda o: probe(o, "readinessProbe")["periodSeconds"] == 7
    ),
    "inference.readinessProbe.failureThreshold": Case(
        7, lambda o: probe(o, "readinessProbe")["failureThreshold"] == 7
    ),
    "inference.livenessProbe.periodSeconds": Case(
        7, lambda o: probe(o, "livenessProbe")["periodSeconds"] == 7
    ),
    "inference.livenessProbe.failureThreshold": Case(
        7, lambda o: probe(o, "livenessProbe")["failureThreshold"] == 7
    ),
    "inference.preStopSeconds": Case(
        0, lambda o: server(o) and "lifecycle" not in server(o)["containers"][0]
    ),
    "inference.strategy": Case(
        {"type": "Recreate"}, lambda o: deployment(o)["spec"]["strategy"] == {"type": "Recreate"}
    ),
    "inference.revisionHistoryLimit": Case(
        1, lambda o: deployment(o)["spec"]["revisionHistoryLimit"] == 1
    ),
    "inference.podLabels": Case(
        {"a": "b"}, lambda o: deployment(o)["spec"]["template"]["metadata"]["labels"]["a"] == "b"
    ),
    "inference.podAnnotations": Case(
        {"a": "b"},
        lambda o: deployment(o)["spec"]["template"]["metadata"]["annotations"] == {"a": "b"},
    ),
}

CASES: dict[str, Case] = {
    **GENERAL,
    **S3,
    **JOBS,
    **placed("jobs", worker, {}),
    **{
        key: case if case.given or key == "inference.enabled" else case._replace(given=SERVING)
        for key, case in INFERENCE.items()
    },
    **placed("inference", server, SERVING),
}


def holds(case: Case, objects: Objects) -> bool:
    try:
        return bool(case.holds(objects))
    except (KeyError, IndexError, StopIteration):
        return False


@pytest.mark.parametrize("name", CASES)
def test_value(chart: SimpleNamespace, name: str) -> None:
    case = CASES[name]
    assert not holds(case, chart.render(dict(case.given))), "true without the value"
    assert holds(case, chart.render({**case.given, name: case.value}))


def test_every_value_is_documented_and_tested(chart: SimpleNamespace) -> None:
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    source = (chart.path / "values.yaml").read_text()
    assert {value.path for value in script.documented(source)} == set(CASES)


@pytest.mark.parametrize(
    ("key", "value", "holds"),
    [
        ("nodes", 2, lambda o: env(worker(o))["TITA_NUM_NODES"] == "2"),
        ("gpusPerNode", 8, lambda o: env(worker(o))["TITA_PROCS_PER_NODE"] == "8"),
        ("gpusPerNode", 0, lambda o: "nvidia" not in str(worker(o)["containers"][0]["resources"])),
        ("schedule", "@daily", lambda o: not job(o)["spec"]["suspend"]),
        ("backoffLimit", 0, lambda o: jobspec(o)["backoffLimit"] == 0),
        ("activeDeadlineSeconds", 60, lambda o: jobspec(o)["activeDeadlineSeconds"] == 60),
        ("recipe", {"beta": 0.5}, lambda o: env(worker(o))["TITA_RECIPE"] == '{"beta":0.5}'),
        ("nodeSelector", {"a": "b"}, lambda o: worker(o)["nodeSelector"] == {"a": "b"}),
    ],
)
def test_value_for_one_job(
    chart: SimpleNamespace, key: str, value: Any, holds: Callable[[Objects], bool]
) -> None:
    assert holds(chart.render({"jobs.perJob.train-dpo": {key: value}}))
    others = chart.render({"jobs.perJob.train-dpo": {key: value}})
    assert worker(others, "build-pairs") == worker(chart.render(), "build-pairs")


def test_no_request_is_lost_in_an_upgrade(chart: SimpleNamespace) -> None:
    objects = chart.render(SERVING)
    rolling = deployment(objects)["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    (container,) = server(objects)["containers"]
    slept = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    # Proxies look every readiness period; what is running may still finish after that.
    assert slept >= container["readinessProbe"]["periodSeconds"]
    assert server(objects)["terminationGracePeriodSeconds"] > 60 + slept


def test_a_recipe_adds_to_the_benchmarks(chart: SimpleNamespace) -> None:
    objects = chart.render({**SERVING, "jobs.perJob.benchmark.recipe": {"concurrency": 2}})
    recipe = env(worker(objects, "benchmark"))["TITA_RECIPE"]
    assert '"concurrency":2' in recipe
    assert '"base_url":"http://tita-inference:8000/v1"' in recipe


def test_the_benchmark_sleeps_until_there_is_someone_to_ask(chart: SimpleNamespace) -> None:
    assert job(chart.render(), "benchmark")["spec"]["suspend"]
    serving = job(chart.render(SERVING), "benchmark")["spec"]
    assert not serving["suspend"]
    assert serving["concurrencyPolicy"] == "Forbid"
    elsewhere = {"jobs.perJob.benchmark.recipe": {"base_url": "http://elsewhere/v1"}}
    assert not job(chart.render(elsewhere), "benchmark")["spec"]["suspend"]
