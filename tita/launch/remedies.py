"""What the cluster's messages and the exit codes of containers mean, and what to do about them."""

import re
from collections.abc import Mapping

from tita.errors import ExitCode

# The first pattern that is found in the cluster's words chooses the remedy.
_REMEDIES = (
    (r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim \S+ not found",
     "see `kubectl get pvc`; check the storage class in the release's values"),
    (r"no storage class is set|storageclass\S* \S+ not found",
     "name one of `kubectl get storageclass` in the release's values"),
    (r"EmptyDir volume \"shm\"", "raise jobs.shmSize in the release's values"),
    (r"EmptyDir volume \"(scratch|cache)\"", "raise its size under jobs in the release's values"),
    (r"low on resource: ephemeral-storage",
     "name a storage class in jobs.scratch and jobs.cache, or take nodes with larger disks"),
    (r"low on resource: memory",
     "raise jobs.resources.requests.memory in the release's values: nodes are filled by requests"),
    (r"Insufficient \S*(gpu|rdma)", "ask for fewer with --gpus, or wait until others are done"),
    (r"Insufficient (cpu|memory|ephemeral-storage)",
     "wait, or lower jobs.resources in the release's values"),
    (r"untolerated taint", "add the taint to jobs.tolerations in the release's values"),
    (r"didn't match Pod's node affinity/selector", "check jobs.nodeSelector and jobs.affinity"),
    (r"exceeded quota", "ask for less, or have the namespace's ResourceQuota raised"),
    (r"failed quota: .*must specify",
     "set them in jobs.resources in the release's values, as the namespace's quota demands"),
    (r"(maximum|minimum) \S+ usage per|limit to request ratio",
     "fit jobs.resources in the release's values to the namespace's LimitRange"),
    (r"violates PodSecurity", "check jobs' security values, or the namespace's Pod Security level"),
    (r"serviceaccount \S+ not found", "set serviceAccount.create, or make the account"),
    (r"secret \S+ not found", "create the secret, or mend its name in the release's values"),
    (r"configmap \S+ not found", "create the ConfigMap, or mend its name in the values"),
    (r"InvalidImageName", "mend --image, or image.* in the release's values"),
    (r"unauthorized|denied|authentication required|no basic auth",
     "check imagePullSecrets in the release's values"),
    (r"manifest unknown|not found|NotFound", "check that the image and its tag exist"),
    (r"ErrImage|ImagePullBackOff", "check the image, the registry and imagePullSecrets"),
    (r"Failed(Mount|AttachVolume)", "see `kubectl describe pod`; check the volumes in the values"),
)  # fmt: skip


def remedy_for(words: str) -> str:
    """What to do about these words of the cluster; empty if nothing is known."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, words):
            return remedy
    return ""


def plain(words: str) -> str:
    """In one line, without what the scheduler adds of its search for victims."""
    words = " ".join(words.split()).partition(" preemption: ")[0]
    return words.removesuffix(" no new claims to deallocate,").rstrip(".")


_WORDS: Mapping[int, str] = {
    ExitCode.FAILED: "the job failed",
    ExitCode.USER: "a mistake in the recipe or the data",
    ExitCode.OUT_OF_MEMORY: "out of device memory",
    ExitCode.HUNG: "a rank hung and its watchdog ended it",
    ExitCode.RETRY: "preempted, or the store or network was away",
    ExitCode.LOST_PEER: "lost the connection to another rank",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "ended by SIGTERM",
    126: "the image's command cannot be executed",
    127: "the image has no such command",
    134: "aborted (SIGABRT)",
    135: "bus error: /dev/shm may be full",
    137: "killed (SIGKILL)",
    139: "segmentation fault",
}


def describe_exit_code(code: int, *, reason: str = "") -> str:
    """What an exit code means. OOMKilled says so only with 137: that reason also comes with 0."""
    if code == 137 and reason == "OOMKilled":
        return "out of memory: the container's limit was reached"
    if code in _WORDS:
        return _WORDS[code]
    if code > 128:
        return f"killed by signal {code - 128}"
    return "failed"
