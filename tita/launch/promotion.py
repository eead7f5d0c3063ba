"""Promotes a reward model: moves the store's pointer, and restarts the inference server."""

import re
import time
from dataclasses import dataclass, replace

from tita.errors import JobFailed, TitaError
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import (
    INSTANCE_LABEL,
    Object,
    condition,
    main_container,
    plain_environment,
)
from tita.launch.preflight import is_allowed
from tita.launch.runs import CURRENT, read_run
from tita.launch.scope import CommandScope
from tita.launch.watch import read_log
from tita.records import REWARD_NAME, read_loaded_model
from tita.storage import Store
from tita.storage.locate import Pointer, read_pointer, write_pointer
from tita.terminal import progress, say

_PAST = "reward/past/"
_RESTARTED_AT = "kubectl.kubernetes.io/restartedAt"
_DEPLOYMENTS = "deployments.apps"
_REWARD = re.compile(rf"--reward[= ](?:({REWARD_NAME.pattern})=)?(\S+)")


def promote(store: Store, run: str) -> Pointer:
    """Point `reward/current` at this run's model, and keep the previous pointer.

    Raises:
        TitaError: the run is not complete, or has no model.
    """
    manifest = store.read_manifest(f"runs/{run}")
    if manifest is None:
        read_run(store, run)
        raise TitaError(
            f"run {run!r} is not complete (no manifest)", where=store.uri, remedy="wait for its end"
        )
    if manifest.find("model/config.json") is None:
        raise TitaError(
            f"run {run!r} has no model", where=store.uri, remedy="choose a run of train-dpo"
        )
    for warning in read_run(store, run).facts.get("warnings") or ():
        say(f"warning: run {run!r}: {warning}")
    target, now = f"runs/{run}/model", read_pointer(store, CURRENT)
    if now is not None and now.target == target:
        return now
    moved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    previous = None
    if now is not None:
        previous = f"{_PAST}{now.moved.replace(':', '')}-{time.time_ns() % 10**9:09d}.json"
        write_pointer(store, previous, now)
    pointer = Pointer(target=target, moved=moved, previous=previous)
    write_pointer(store, CURRENT, pointer)
    return pointer


def rollback(store: Store) -> Pointer:
    """Restore the pointer from before the last promotion.

    Raises:
        TitaError: there is none.
    """
    runs = CommandScope(store=store.uri).tita("runs list")
    remedy = f"promote the run that you want, see `{runs}`"
    now = read_pointer(store, CURRENT)
    if now is None or now.previous is None:
        raise TitaError(
            "no previous model to roll back to",
            where=f"{store.uri}/{CURRENT}",
            remedy=remedy,
        )
    before = read_pointer(store, now.previous)
    if before is None:
        raise TitaError(
            "the previous pointer is missing",
            where=f"{store.uri}/{now.previous}",
            remedy=remedy,
        )
    write_pointer(store, CURRENT, before)
    return before


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRollout:
    """The inference Deployments of a release, checked to follow the store's pointer."""

    cluster: Cluster
    scope: CommandScope
    """That of the cluster and of the store."""
    deployments: tuple[Object, ...]

    @classmethod
    def prepare(
        cls, cluster: Cluster, store: Store, *, release: str | None = None
    ) -> "InferenceRollout":
        """Find what a restart would affect; nothing is changed.

        Raises:
            TitaError: there are several releases and `release` is not given; a Deployment reads
                another store or another reward model; or the user may not restart it.
        """
        selector = "app.kubernetes.io/component=inference"
        selector += f",{INSTANCE_LABEL}={release}" if release else ""
        listed, _ = cluster.list(cluster.path(_DEPLOYMENTS), labelSelector=selector)
        # The name in their labels is a chart value, and other charts use this component, too.
        found = [item for item in listed if _is_of_tita(item)]
        releases = sorted({item["metadata"]["labels"].get(INSTANCE_LABEL, "?") for item in found})
        if len(releases) > 1:
            raise TitaError(
                f"{len(releases)} releases have an inference Deployment",
                where=f"namespace {cluster.namespace}",
                remedy=f"set --release {' or --release '.join(releases)}",
            )
        for item in found:
            _check_reads_pointer(item, store)
            name = item["metadata"]["name"]
            if not is_allowed(cluster, "patch", _DEPLOYMENTS, name=name):
                raise TitaError(
                    "no permission to restart it (patch deployments.apps)",
                    where=f"Deployment {name}",
                    remedy="have your user added to the release's rbac.subjects, or use --no-roll",
                )
        scope = cluster.scope.on_store(store.uri)
        return cls(cluster=cluster, scope=scope, deployments=tuple(found))

    def restart(self) -> "InferenceRollout":
        """Restart the Deployments as `kubectl rollout restart` does; their new state."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        annotations = {"metadata": {"annotations": {_RESTARTED_AT: stamp}}}
        change = {"spec": {"template": annotations}}
        patched = [self.cluster.patch(self._path(item), change) for item in self.deployments]
        return replace(self, deployments=tuple(patched))

    def wait(self, target: str, *, every_s: float = 2.0) -> None:
        """Wait until all replicas are new and ready, and check which reward model they loaded.

        Raises:
            JobFailed: a Deployment exceeded its progress deadline, or loaded another model.
        """
        for item in self.deployments:
            name = item["metadata"]["name"]
            replicas = item["spec"].get("replicas", 1)
            with progress(f"restarting {name}", total=replicas, unit="pods") as advance:
                ready = 0
                while True:
                    now = self.cluster.get(self._path(item))
                    updated = _updated_and_ready(now)
                    advance(updated - ready)
                    ready = updated
                    if _is_rolled_out(now):
                        break
                    stalled = condition(now, "Progressing", status="False")
                    # Before the controller has seen the restart, it is about the rollout before.
                    if (
                        _is_observed(now)
                        and stalled
                        and stalled.get("reason") == "ProgressDeadlineExceeded"
                    ):
                        raise JobFailed(
                            f"its new pods are not ready ({stalled.get('message', '')}); the old "
                            "ones answer with the previous model",
                            where=f"Deployment {name}",
                            remedy=f"see `{self.scope.tita('doctor')}`, or "
                            f"`{self.scope.tita('promote', '--rollback')}`",
                        )
                    time.sleep(every_s)
            self._check_loaded(now, target)

    def _check_loaded(self, deployment: Object, target: str) -> None:
        name = deployment["metadata"]["name"]
        labels = deployment["spec"]["selector"]["matchLabels"]
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        stamp = deployment["spec"]["template"]["metadata"]["annotations"][_RESTARTED_AT]
        pods, _ = self.cluster.list(self.cluster.path("pods"), labelSelector=selector)
        for pod in pods:
            annotations = pod["metadata"].get("annotations") or {}
            if annotations.get(_RESTARTED_AT) != stamp:
                continue
            try:
                lines = list(read_log(self.cluster, pod["metadata"]["name"], limit_bytes=1 << 16))
            except ApiError as error:
                say(f"cannot verify which model {name} loaded: {error.what}")
                return
            loaded = dict(filter(None, map(read_loaded_model, lines)))
            found = {loaded.get(role) for role in _pointer_roles(deployment, self.scope.store)}
            if wrong := found - {target}:
                raise JobFailed(
                    f"loaded {wrong.pop() or 'no reward model'}, not {target}",
                    where=f"pod {pod['metadata']['name']}",
                    remedy="the pointer may have moved again: "
                    f"`{self.scope.tita('runs list')}` marks the promoted run; check "
                    "inference.reward and s3 in the release's values",
                )

    def _path(self, deployment: Object) -> str:
        return self.cluster.path(_DEPLOYMENTS, deployment["metadata"]["name"])


def _is_of_tita(deployment: Object) -> bool:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    names = (entry["name"] for c in containers for entry in c.get("env") or [])
    return "TITA_STORE" in names


def _check_reads_pointer(deployment: Object, store: Store) -> None:
    """Raise unless a restart of this Deployment loads what the store's pointer names."""
    labels, name = deployment["metadata"]["labels"], deployment["metadata"]["name"]
    container = main_container(deployment["spec"]["template"])
    reads = plain_environment(container).get("TITA_STORE", "")
    where = f"release {labels.get(INSTANCE_LABEL, '?')}"
    if reads.rstrip("/") != store.uri.rstrip("/"):
        raise TitaError(
            f"{name} reads the store {reads}, not {store.uri}",
            where=where,
            remedy=f"use --store {reads}, or --no-roll to move the pointer of {store.uri} only",
        )
    if not _pointer_roles(deployment, store.uri):
        models = ", ".join(_rewards(deployment).values())
        loads = f"loads {models}" if models else "has no reward model"
        raise TitaError(
            f"{name} {loads}, not {CURRENT}",
            where=where,
            remedy=f"set inference.reward={CURRENT} in the release's values, or use --no-roll",
        )


def _rewards(deployment: Object) -> dict[str, str]:
    """The reward models of a Deployment, by their roles in the server's log."""
    container = main_container(deployment["spec"]["template"])
    arguments = " ".join(container.get("args") or [])
    return {found[1] or "reward": found[2] for found in _REWARD.finditer(arguments)}


def _pointer_roles(deployment: Object, store: str | None) -> list[str]:
    """The roles of the reward models that a Deployment reads through the store's pointer."""
    pointers = (CURRENT, f"{store}/{CURRENT}")
    return [role for role, model in _rewards(deployment).items() if model in pointers]


def _updated_and_ready(deployment: Object) -> int:
    if not _is_observed(deployment):
        return 0
    status = deployment.get("status") or {}
    return min(int(status.get("updatedReplicas", 0)), int(status.get("availableReplicas", 0)))


def _is_rolled_out(deployment: Object) -> bool:
    """As `kubectl rollout status` decides: all replicas are updated, and no old one is left."""
    wanted = int(deployment["spec"].get("replicas", 1))
    total = int((deployment.get("status") or {}).get("replicas", 0))
    return _is_observed(deployment) and _updated_and_ready(deployment) >= wanted and total <= wanted


def _is_observed(deployment: Object) -> bool:
    """Whether the status is about the current spec."""
    observed = (deployment.get("status") or {}).get("observedGeneration", 0)
    return bool(observed >= deployment["metadata"].get("generation", 0))
