"""What the cluster's messages and containers' exit codes mean, and what to do about them."""

import re
from collections.abc import Mapping

from tita.errors import ABORTED, ExitCode

# The first pattern that matches the cluster's message selects the remedy.
_MESSAGE_REMEDIES = (
    (r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim \S+ not found",
     "see `{kubectl} get pvc`; check the storage class in the release's values"),
    (r"no storage class is set|storageclass\S* \S+ not found",
     "set one of `{kubectl} get storageclass` in the release's values"),
    (r"EmptyDir volume \"shm\"", "raise jobs.shmSize in the release's values"),
    (r"EmptyDir volume \"(scratch|cache)\"", "raise its size under jobs in the release's values"),
    (r"low on resource: ephemeral-storage",
     "set a storage class in jobs.scratch and jobs.cache, or use nodes with larger disks"),
    (r"low on resource: memory|condition: \[[^]]*MemoryPressure",
     "raise jobs.resources.requests.memory in the release's values: nodes are filled by requests"),
    (r"ephemeral storage limit|ephemeral local storage usage",
     "raise ephemeral-storage in jobs.resources.limits, or set a storage class in jobs.scratch and "
     "jobs.cache"),
    (r"low on resource: inodes|condition: \[[^]]*DiskPressure",
     "free the node's disk, for example of unused images, or cordon the node"),
    (r"low on resource: pids|condition: \[[^]]*PIDPressure",
     "cordon the node until its processes are fewer"),
    (r"no healthy devices present", "cordon the node until its device plugin reports healthy GPUs"),
    # An extended resource, such as nvidia.com/gpu, nvidia.com/mig-1g.10gb and rdma/hca.
    (r"Insufficient \S+/\S+", "use fewer with --gpus, or wait until other runs are done"),
    (r"Insufficient \S+", "wait, or lower jobs.resources in the release's values"),
    (r"untolerated taint", "add the taint to jobs.tolerations in the release's values"),
    (r"didn't match Pod's node affinity/selector", "check jobs.nodeSelector and jobs.affinity"),
    (r"exceeded quota", "use fewer resources, or raise the namespace's ResourceQuota"),
    (r"failed quota: .*must specify",
     "set them in jobs.resources in the release's values, as the namespace's quota requires"),
    (r"(maximum|minimum) \S+ usage per|limit to request ratio",
     "fit jobs.resources in the release's values to the namespace's LimitRange"),
    (r"violates PodSecurity", "check jobs' security values, or the namespace's Pod Security level"),
    (r"serviceaccount \S+ not found", "set serviceAccount.create, or create the account"),
    (r"secret \S+ not found", "create the secret, or fix its name in the release's values"),
    (r"configmap \S+ not found", "create the ConfigMap, or fix its name in the values"),
    (r"InvalidImageName", "fix --image, or image.* in the release's values"),
    (r"unauthorized|denied|authentication required|no basic auth",
     "check imagePullSecrets in the release's values"),
    (r"manifest unknown|not found|NotFound", "check that the image and its tag exist"),
    (r"ErrImage|ImagePullBackOff", "check the image, the registry and imagePullSecrets"),
    (r"Failed(Mount|AttachVolume)",
     "see `{kubectl} describe pod`; check the volumes in the values"),
)  # fmt: skip

_EXIT_CODES: Mapping[int, str] = {
    ExitCode.FAILED: "the job failed",
    ExitCode.USER: "an error in the recipe or the data",
    ExitCode.GATE_MISSED: "a benchmark gate was missed",
    ExitCode.NO_DEVICE: "it holds GPUs, and none is usable",
    ExitCode.OUT_OF_TRIES: "no tries are left",
    ExitCode.GANG_INCOMPLETE: "not all nodes of the gang started in time",
    ExitCode.OUT_OF_MEMORY: "out of device memory",
    ExitCode.DAMAGED: "a tree or an object in the store is damaged",
    ExitCode.INCOMPLETE: "too many questions of the benchmark have no answer",
    ExitCode.HUNG: "a rank hung and its watchdog ended it",
    ExitCode.CONFLICT: "another process changed the same tree of the store",
    ExitCode.RETRY: "preempted, or the store or network was unavailable",
    ExitCode.LOST_PEER: "lost the connection to another rank",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "ended by SIGTERM",
    126: "the image's command cannot be executed",
    127: "the image has no such command",
    ABORTED: "aborted (SIGABRT), as NCCL does when a node is lost",
    135: "bus error: /dev/shm may be full",
    137: "killed (SIGKILL)",
    139: "segmentation fault",
}
EXIT_CODE_REMEDIES: Mapping[int, str] = {
    ExitCode.GANG_INCOMPLETE: "launch it when enough GPUs are free, let Kueue start all pods "
    "together (--queue), or wait longer (--gang-timeout)",
    ExitCode.GATE_MISSED: "compare the scores: {tita reports open latest}",
    ExitCode.NO_DEVICE: "check the node's driver and GPU runtime, or set allow_cpu=true",
    ExitCode.DAMAGED: "push the tree that the log names again",
    ExitCode.INCOMPLETE: "check the inference server: {tita doctor}",
    ExitCode.OUT_OF_MEMORY: "halve the batch: --set batch_size=..., or --set deepspeed=zero3",
    ExitCode.HUNG: "the last line of each rank's log shows where it hung",
    ExitCode.RETRY: "{tita doctor} checks the store",
    ExitCode.LOST_PEER: "check the other pods, and networkPolicy in the values",
    135: "raise jobs.shmSize in the release's values",
}
FAILURE_REASONS: Mapping[str, str] = {
    "BackoffLimitExceeded": "no tries are left",
    "DeadlineExceeded": "its deadline passed, pending time included",
    "PodFailurePolicy": "a retry would fail the same way",
    "FailedIndexes": "some ranks failed for good",
    "MaxFailedIndexesExceeded": "too many ranks failed for good",
}
"""Reasons of a Job's `Failed` condition."""


def remedy_for(message: str) -> str:
    """What to do about a message of the cluster; empty if nothing is known."""
    for pattern, remedy in _MESSAGE_REMEDIES:
        if re.search(pattern, message):
            return remedy
    return ""


def one_line(message: str) -> str:
    """A message in one line, without the scheduler's notes on preemption."""
    message = " ".join(message.split()).partition(" preemption: ")[0]
    return message.removesuffix(" no new claims to deallocate,").rstrip(".")


def describe_exit_code(code: int, *, reason: str = "") -> str:
    """What an exit code means.

    OOMKilled counts only with 137: Kubernetes reports that reason with exit code 0, too.
    """
    if code == 137 and reason == "OOMKilled":
        return "out of memory: the container's limit was reached"
    if code in _EXIT_CODES:
        return _EXIT_CODES[code]
    return f"killed by signal {code - 128}" if code > 128 else "failed"
