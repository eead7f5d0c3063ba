"""From training to serving: move the pointer, then have inference load what it leads to."""

import time

from tita.errors import TitaError
from tita.launch.cluster import Cluster
from tita.launch.template import INSTANCE_LABEL

_RESTARTED = "kubectl.kubernetes.io/restartedAt"


def roll_inference(cluster: Cluster, *, release: str | None = None) -> list[str]:
    """Restart the release's inference Deployments as `kubectl rollout restart` does.

    Returns:
        Their names; none where inference is not installed.

    Raises:
        TitaError: several releases serve and none is named.
    """
    selector = "app.kubernetes.io/component=inference"
    selector += f",{INSTANCE_LABEL}={release}" if release else ",app.kubernetes.io/name=tita"
    found, _ = cluster.list(cluster.path("deployments.apps"), labelSelector=selector)
    releases = sorted({item["metadata"]["labels"].get(INSTANCE_LABEL, "?") for item in found})
    if len(releases) > 1:
        raise TitaError(
            f"{len(releases)} releases serve",
            remedy=f"give --release {' or --release '.join(releases)}",
        )
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    change = {"spec": {"template": {"metadata": {"annotations": {_RESTARTED: stamp}}}}}
    for item in found:
        cluster.patch(cluster.path("deployments.apps", item["metadata"]["name"]), change)
    return [item["metadata"]["name"] for item in found]
