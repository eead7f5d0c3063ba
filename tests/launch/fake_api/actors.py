"""Acts as controllers, scheduler and kubelets, on a test's command."""

import uuid
from typing import Any

from fake_api.objects import INDEX, JOB_NAME, Log, Object, Objects, nanos, now


class Actors(Objects):
    """Creates, runs and ends pods; ends Jobs."""

    def pod(
        self,
        run: str,
        index: int = 0,
        *,
        node: str = "",
        suffix: str = "abcde",
        namespace: str = "lab",
    ) -> str:
        """A new pod of a run: pending, or running on `node`."""
        name = f"{run}-{index}-{suffix}"
        labels = {JOB_NAME: run, INDEX: str(index), "app.kubernetes.io/component": "job"}
        item: Object = {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": labels,
                "annotations": {INDEX: str(index)},
            },
            "spec": {"restartPolicy": "Never", "containers": [{"name": "tita", "image": "tita"}]},
            "status": {"phase": "Pending"},
        }
        self.put("pods", item)
        self.logs[name] = [Log()]
        if node:
            self.run_pod(name, node=node)
        return name

    def status(self, name: str, **status: Any) -> None:
        """Set fields of a pod's status."""
        pod = self.get("pods", name)
        pod["status"] |= status
        self.put("pods", pod)

    def unschedulable(self, name: str, message: str) -> None:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        self.status(name, conditions=[condition | {"message": message}])

    def waiting(self, name: str, reason: str, message: str = "", *, node: str = "node-1") -> None:
        self.container(name, {"waiting": {"reason": reason, "message": message}}, node=node)

    def run_pod(self, name: str, *, node: str = "node-1") -> None:
        self.status(name, phase="Running")
        self.container(name, {"running": {"startedAt": now()}}, node=node)

    def end_pod(
        self, name: str, code: int, *, reason: str = "", message: str = "", **status: Any
    ) -> None:
        """The container ends; `status` sets more fields of the pod's status."""
        state = {"exitCode": code, "reason": reason or ("Completed" if not code else "Error")}
        state |= {"message": message, "finishedAt": now()}
        self.container(name, {"terminated": state})
        self.status(name, phase="Failed" if code else "Succeeded", **status)
        with self.changed:
            self.logs[name][-1].closed = True
            self.changed.notify_all()

    def restart(self, name: str) -> None:
        """The kubelet restarts the container, with a new log."""
        with self.changed:
            self.logs[name][-1].closed = True
            self.logs[name].append(Log())
            self.container(name, {"running": {"startedAt": now()}}, restarts=1)

    def container(
        self, name: str, state: Object, *, node: str | None = None, restarts: int = 0
    ) -> None:
        pod = self.get("pods", name)
        if node:
            pod["spec"]["nodeName"] = node
            scheduled = {"type": "PodScheduled", "status": "True"}
            pod["status"]["conditions"] = [scheduled]
        pod["status"]["containerStatuses"] = [
            {"name": "tita", "state": state, "restartCount": restarts}
        ]
        self.put("pods", pod)

    def write(self, name: str, *texts: str) -> None:
        """The container writes lines."""
        with self.changed:
            for text in texts:
                self.logs[name][-1].lines.append((nanos(), text))
            self.changed.notify_all()

    def event(self, name: str, reason: str, message: str, *, kind: str = "Pod") -> None:
        item = {
            "metadata": {"name": f"{name}.{uuid.uuid4().hex[:8]}"},
            "involvedObject": {"kind": kind, "name": name},
            "reason": reason,
            "message": message,
            "lastTimestamp": now(),
        }
        self.put("events", item)

    def job_over(
        self, run: str, kind: str, *, reason: str = "", message: str = "", namespace: str = ""
    ) -> None:
        """The Job is `Complete` or `Failed`; active pods of a failed one are deleted."""
        job = self.get("jobs.batch", run, namespace=namespace)
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        condition["lastTransitionTime"] = now()
        pods = self.pods(run, namespace=namespace)
        failed = [pod for pod in pods if pod["status"]["phase"] == "Failed"]
        job["status"] = {"conditions": [condition], "failed": len(failed)}
        if kind == "Complete":
            job["status"]["completionTime"] = now()
        else:
            for pod in pods:
                if pod["status"]["phase"] in ("Pending", "Running"):
                    self.remove("pods", pod["metadata"]["name"])
        self.put("jobs.batch", job)
