"""Cases of the values in `s3`."""

from tests.chart.values.case import (
    SERVING,
    Case,
    Object,
    Objects,
    claim_size,
    env,
    key_of,
    kinds,
    one,
    server,
    volume,
    worker,
)
from tests.chart.values.shared import AFFINITY, RESOURCES, TOLERATION

EMBEDDED = {"s3.embedded.enabled": True, "s3.bucket": ""}
SECRET = {"s3.existingSecret": "keys"}


def embedded(objects: Objects) -> Object:
    spec: Object = one(objects, "StatefulSet", "tita-s3")["spec"]["template"]["spec"]
    return spec


CASES = {
    "s3.bucket": Case("other", lambda o: env(worker(o))["TITA_STORE"].startswith("s3://other")),
    "s3.prefix": Case("/a/b/", lambda o: env(worker(o))["TITA_STORE"].endswith("/a/b")),
    "s3.endpoint": Case(
        "https://s3.example",
        lambda o: env(worker(o))["TITA_S3_ENDPOINT_URL"].endswith("s3.example"),
    ),
    "s3.region": Case("eu-1", lambda o: env(worker(o))["TITA_S3_REGION"] == "eu-1"),
    "s3.pathStyle": Case(True, lambda o: env(worker(o))["TITA_S3_PATH_STYLE"] == "true"),
    "s3.encryption": Case("AES256", lambda o: env(worker(o))["TITA_S3_ENCRYPTION"] == "AES256"),
    "s3.kmsKeyId": Case(
        "alias/mine",
        lambda o: env(worker(o))["TITA_S3_KMS_KEY_ID"] == "alias/mine",
        {"s3.encryption": "aws:kms:dsse"},
    ),
    "s3.requesterPays": Case(True, lambda o: env(worker(o))["TITA_S3_REQUESTER_PAYS"] == "true"),
    "s3.existingSecret": Case(
        "keys",
        lambda o: all(
            key_of(pod, name) == ("keys", name)
            for pod in (worker(o), server(o))
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        ),
        SERVING,
        alone=True,
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
        alone=True,
    ),
    "s3.embedded.image.repository": Case(
        "weed", lambda o: embedded(o)["containers"][0]["image"] == "weed:4.48", EMBEDDED, alone=True
    ),
    "s3.embedded.image.tag": Case(
        "9",
        lambda o: embedded(o)["containers"][0]["image"].endswith("seaweedfs:9"),
        EMBEDDED,
        alone=True,
    ),
    "s3.embedded.image.digest": Case(
        f"sha256:{'1' * 64}",
        lambda o: embedded(o)["containers"][0]["image"].endswith(f"@sha256:{'1' * 64}"),
        EMBEDDED,
        alone=True,
    ),
    "s3.embedded.persistence.enabled": Case(
        False,
        lambda o: volume(embedded(o), "data") == {"name": "data", "emptyDir": {}},
        EMBEDDED,
        alone=True,
    ),
    "s3.embedded.existingCertificate": Case(
        "cert",
        lambda o: (
            volume(embedded(o), "certificate")["secret"]["secretName"] == "cert"
            and not [x for x in o if x["metadata"]["name"] == "tita-s3-grpc"]
        ),
        EMBEDDED,
        alone=True,
    ),
    "s3.embedded.persistence.existingClaim": Case(
        "mine",
        lambda o: (
            volume(embedded(o), "data")["persistentVolumeClaim"]["claimName"] == "mine"
            and "PersistentVolumeClaim" not in kinds(o)
        ),
        EMBEDDED,
        alone=True,
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
    "s3.embedded.nodeSelector": Case(
        {"disk": "ssd"}, lambda o: embedded(o)["nodeSelector"] == {"disk": "ssd"}, EMBEDDED
    ),
    "s3.embedded.tolerations": Case(
        TOLERATION, lambda o: embedded(o)["tolerations"] == TOLERATION, EMBEDDED
    ),
    "s3.embedded.affinity": Case(AFFINITY, lambda o: embedded(o)["affinity"] == AFFINITY, EMBEDDED),
}
