"""Cases of the values in `inference`."""

from pathlib import PurePosixPath

from tests.chart.values.case import (
    SERVING,
    Case,
    Object,
    Objects,
    claim_size,
    deployment,
    env,
    key_of,
    kinds,
    one,
    server,
    volume,
    worker,
)
from tests.chart.values.shared import shared_cases

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
VLLM = {**SERVING, "inference.engine": "vllm"}
CLAIM = {**SERVING, "inference.cache.persistence.enabled": True}


def arguments(objects: Objects, name: str) -> list[str]:
    given = server(objects)["containers"][0]["args"]
    return [a.partition("=")[2] for a in given if a.startswith(f"--{name}=")]


def argument(objects: Objects, name: str) -> str:
    return arguments(objects, name)[0]


def keys_file(objects: Objects) -> tuple[str, str]:
    """Return the Secret and its key that are mounted as the API keys file.

    The directory is mounted, because the kubelet does not update subPath mounts.
    """
    path = PurePosixPath(argument(objects, "api-keys-file"))
    (container,) = server(objects)["containers"]
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == str(path.parent)]
    assert "subPath" not in mount
    secret = volume(server(objects), mount["name"])["secret"]
    (item,) = secret["items"]
    assert item["path"] == path.name
    return secret["secretName"], item["key"]


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


def ingress(objects: Objects) -> Object:
    return one(objects, "Ingress", "tita-inference")


def http_route(objects: Objects) -> Object:
    return one(objects, "HTTPRoute", "tita-inference")


def limits(objects: Objects) -> Object:
    found: Object = server(objects)["containers"][0]["resources"]["limits"]
    return found


def service(objects: Objects) -> Object:
    return one(objects, "Service", "tita-inference")


_CASES = {
    "inference.enabled": Case(True, lambda o: server(o) and service(o), alone=True),
    "inference.base": Case("llava", lambda o: argument(o, "base") == "llava"),
    "inference.reward": Case("", lambda o: "--reward" not in str(server(o)), alone=True),
    "inference.weight": Case(
        0.7,
        lambda o: (
            argument(o, "weight") == "0.7"
            and '"weights":[0,0.7]' in env(worker(o, "benchmark"))["TITA_RECIPE"]
        ),
    ),
    "inference.rewards": Case(
        {"brief": "reward/brief", "faithful": "reward/faithful"},
        lambda o: arguments(o, "reward") == ["brief=reward/brief", "faithful=reward/faithful"],
        alone=True,
    ),
    "inference.weights": Case(
        {"brief": 0.1},
        lambda o: arguments(o, "weight") == ["brief=0.1"],
        given={**SERVING, "inference.rewards": {"brief": "reward/brief"}},
        alone=True,
    ),
    "inference.reference": Case(
        "reward/start", lambda o: argument(o, "reference") == "reward/start"
    ),
    "inference.form": Case("genarm", lambda o: argument(o, "form") == "genarm"),
    "inference.plausibility": Case(0.1, lambda o: argument(o, "plausibility") == "0.1"),
    "inference.dtype": Case("bfloat16", lambda o: argument(o, "dtype") == "bfloat16"),
    "inference.maxBatch": Case(4, lambda o: argument(o, "max-batch") == "4"),
    "inference.engine": Case("vllm", lambda o: argument(o, "engine") == "vllm", alone=True),
    "inference.vllm.tensorParallelSize": Case(
        4,
        lambda o: (
            argument(o, "tensor-parallel-size") == "4"
            and limits(o)["nvidia.com/gpu"] == 8
            and env(server(o))["TITA_GPUS"] == "8"
            and volume(server(o), "shm")["emptyDir"]["sizeLimit"] == "9Gi"
        ),
        {**VLLM, "inference.vllm.pipelineParallelSize": 2},
    ),
    "inference.vllm.pipelineParallelSize": Case(
        3,
        lambda o: argument(o, "pipeline-parallel-size") == "3" and limits(o)["nvidia.com/gpu"] == 3,
        VLLM,
    ),
    "inference.vllm.maxModelLen": Case(
        2097152, lambda o: argument(o, "max-model-len") == "2097152", VLLM
    ),
    "inference.vllm.gpuMemoryUtilization": Case(
        0.85, lambda o: argument(o, "gpu-memory-utilization") == "0.85", VLLM
    ),
    "inference.vllm.enforceEager": Case(
        True, lambda o: "--enforce-eager" in server(o)["containers"][0]["args"], VLLM
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
    "inference.gpus": Case(0, lambda o: "nvidia.com/gpu" not in limits(o)),
    "inference.cache.persistence.enabled": Case(
        True,
        lambda o: (
            volume(server(o), "cache")["persistentVolumeClaim"]["claimName"]
            == one(o, "PersistentVolumeClaim", "tita-inference-cache")["metadata"]["name"]
        ),
        alone=True,
    ),
    "inference.cache.persistence.existingClaim": Case(
        "mine",
        lambda o: (
            volume(server(o), "cache")["persistentVolumeClaim"]["claimName"] == "mine"
            and "PersistentVolumeClaim" not in kinds(o)
        ),
        CLAIM,
        alone=True,
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
        ["ReadWriteMany"],
        lambda o: (
            one(o, "PersistentVolumeClaim", "tita-inference-cache")["spec"]["accessModes"]
            == ["ReadWriteMany"]
        ),
        CLAIM,
    ),
    "inference.cache.persistence.size": Case(
        "7Gi", lambda o: claim_size(o, "tita-inference-cache") == "7Gi", CLAIM
    ),
    "inference.auth.existingSecret": Case(
        "keys",
        lambda o: (
            all(
                key_of(pod, "TITA_API_KEYS") == ("keys", "api-keys")
                for pod in (worker(o, "benchmark"), one(o, "Pod", "tita-test")["spec"])
            )
            and keys_file(o) == ("keys", "api-keys")
        ),
    ),
    "inference.auth.secretKey": Case(
        "k",
        lambda o: (
            keys_file(o) == ("keys", "k")
            and key_of(worker(o, "benchmark"), "TITA_API_KEYS") == ("keys", "k")
        ),
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
        True, lambda o: scaler(o) and "replicas" not in deployment(o)["spec"], alone=True
    ),
    "inference.autoscaling.kind": Case("keda", trigger, SCALING, alone=True),
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
        False, lambda o: server(o) and "PodDisruptionBudget" not in kinds(o), alone=True
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
    "inference.livenessProbe.terminationGracePeriodSeconds": Case(
        7,
        lambda o: all(
            probe(o, name)["terminationGracePeriodSeconds"] == 7
            for name in ("startupProbe", "livenessProbe")
        ),
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
    **{
        key: case if case.given or key == "inference.enabled" else case._replace(given=SERVING)
        for key, case in _CASES.items()
    },
    **shared_cases("inference", server, SERVING),
}
