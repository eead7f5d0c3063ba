"""A drill over two namespaces with namesakes, from the first install to the second."""

import gzip
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.api.server import ApiServer, key_of
from tests.launch.conftest import helm_dir
from tests.launch.drill import NAMESAKE, OTHER, POD_OF, Drill, advice
from tests.s3_server import client
from tita.errors import ExitCode
from tita.launch.promotion import promote
from tita.storage import open_store
from tita.storage.locate import read_pointer

CLAIM = key_of("persistentvolumeclaims", "tita-s3", OTHER)
UPGRADE = "helm -n tita2 upgrade tita charts/tita --reset-then-reuse-values"
WAITING = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False"}]}


@pytest.fixture
def drill(
    request: pytest.FixtureRequest, lab: Any, s3_environment: dict[str, str]
) -> Iterator[Drill]:
    """The cluster with the release `tita` in both namespaces."""
    helm_api = ApiServer()
    lab.api.objects = {k: v for k, v in lab.api.objects.items() if k[0] == "nodes"}
    _, _, bucket, root = s3_environment["TITA_STORE"].split("/")
    tools = helm_dir(getattr(request, "param", "4"))
    made = Drill(lab, helm_api, tools, bucket, root, dict(s3_environment))
    for namespace in (NAMESAKE, OTHER):
        made.helm("install", namespace)
    yield made
    helm_api.shutdown()
    helm_api.server_close()


@pytest.mark.parametrize("drill", ["3", "4"], indirect=True)
def test_the_second_day(drill: Drill) -> None:
    api = drill.lab.api
    roles = [name for plural, name in drill.helm_api.objects if plural == "clusterroles"]
    assert sorted(roles) == ["tita:lab:tita:launcher", "tita:tita2:tita:launcher"]
    for namespace in (NAMESAKE, OTHER):
        assert not drill.doctor(namespace)[0]
        drill.start_pods(namespace)
        assert drill.doctor(namespace)[0]
    first = drill.snapshot(NAMESAKE)

    # Run, upgrade: runs keep their image, and the next one has the new image.
    launch = ("launch", "train-dpo", "--gpus", "4", "--detach", "-n", OTHER)
    done = drill.tita(*launch, "--name", "r")
    assert done.returncode == 0, done.stderr
    run = api.get("jobs.batch", "r", namespace=OTHER)
    drill.helm("upgrade", OTHER, "--set=image.tag=2.0.0")
    assert api.get("jobs.batch", "r", namespace=OTHER) == run
    template = api.get("cronjobs.batch", "tita-train-dpo", namespace=OTHER)
    assert "tita:2.0.0" in str(template["spec"])

    # Rename: the claim stays in use, and runs go on.
    uid = drill.helm_api.objects[CLAIM]["metadata"]["uid"]
    drill.helm("upgrade", OTHER, "--set=image.tag=2.0.0,fullnameOverride=vlm")
    assert drill.helm_api.objects[CLAIM]["metadata"]["uid"] == uid
    renamed = api.get("statefulsets.apps", "vlm-s3", namespace=OTHER)
    assert "'claimName': 'tita-s3'" in str(renamed)
    assert api.get("jobs.batch", "r", namespace=OTHER) == run
    drill.start_pods(OTHER)
    assert drill.doctor(OTHER)[0]
    done = drill.tita(*launch, "--name", "r2")
    assert done.returncode == 0, done.stderr

    # Promote in one namespace.
    drill.put_run(OTHER, "r", beta=0.2)
    done = drill.tita("promote", "r", "-n", OTHER, "--no-wait", "--store", drill.store(OTHER).uri)
    assert done.returncode == 0, done.stderr
    assert "restarting vlm-inference" in done.stderr
    assert drill.promoted(OTHER) == "runs/r/model"

    # Move to a real bucket.
    moved = f"{drill.prefix(OTHER)}-moved"
    assert copy_objects(drill, drill.prefix(OTHER), moved) >= 3
    endpoint = drill.environment["TITA_S3_ENDPOINT_URL"]
    drill.helm(
        "upgrade", OTHER, "--set=image.tag=2.0.0,fullnameOverride=vlm,s3.embedded.enabled=false",
        f"--set=s3.prefix={moved},s3.endpoint={endpoint},s3.existingSecret=keys",
    )  # fmt: skip
    assert CLAIM in drill.helm_api.objects
    reads = str(api.get("deployments.apps", "vlm-inference", namespace=OTHER))
    assert f"s3://{drill.bucket}/{moved}" in reads
    new = open_store(f"s3://{drill.bucket}/{moved}")
    pointer = read_pointer(new, "reward/current")
    assert pointer is not None
    assert pointer.target == "runs/r/model"
    copy = new.pull_tree("runs/r", into=drill.lab.folder / "copy")
    assert "tita2" in (copy / "model" / "config.json").read_text()

    # Remove and install again: runs and the claim are still there, and the claim is used.
    drill.helm("uninstall", OTHER)
    assert api.get("jobs.batch", "r", namespace=OTHER) == run
    drill.helm("install", OTHER)
    assert drill.helm_api.objects[CLAIM]["metadata"]["uid"] == uid
    drill.start_pods(OTHER)
    assert drill.doctor(OTHER)[0]
    assert drill.snapshot(NAMESAKE) == first


def copy_objects(drill: Drill, source: str, destination: str) -> int:
    """Copy the objects of one prefix to another, as any S3 client does."""
    s3 = client(drill.environment["TITA_S3_ENDPOINT_URL"])
    listed = s3.list_objects_v2(Bucket=drill.bucket, Prefix=f"{source}/")["Contents"]
    for key in (entry["Key"] for entry in listed):
        body = s3.get_object(Bucket=drill.bucket, Key=key)["Body"].read()
        s3.put_object(Bucket=drill.bucket, Key=destination + key.removeprefix(source), Body=body)
    return len(listed)


LAUNCH = ["launch", "train-dpo", "--name", "r", "--gpus", "4", "--gang-timeout", "600"]
LAUNCH += ["--no-preflight"]
LAUNCH += ["--set", "beta=0.25", "--set", "out=runs/it's here"]


def test_remedies_for_runs_act_on_their_own_namespace(drill: Drill) -> None:
    api = drill.lab.api
    for namespace, beta in ((NAMESAKE, 0.1), (OTHER, 0.2)):
        drill.start_pods(namespace)
        drill.put_run(namespace, "r", beta=beta)
        done = drill.tita(*LAUNCH, "--detach", "-n", namespace)
        assert done.returncode == 0, done.stderr
    api.pod("r", node="node-1", suffix="good")
    failed = api.pod("r", node="node-1", suffix="bad", namespace=OTHER)
    api.end_pod(failed, 1)
    api.job_over("r", "Failed", reason="BackoffLimitExceeded", namespace=OTHER)
    first = api.get("jobs.batch", "r", namespace=OTHER)
    drill.environment["TITA_STORE"] = drill.store(NAMESAKE).uri
    with drill.namesake_untouched():
        read, again = advice(drill.tita("jobs", "watch", "r", "-n", OTHER).stderr)
        assert read == "tita jobs logs r --all-ranks -n tita2"
        assert advice(drill.tita("jobs", "status", "r", "-n", OTHER).stderr) == [read, again]
        drill.follow(read, code=1)  # that of the run
        assert "--no-preflight" in again
        api.on_job = complete(drill)
        drill.follow(again)
        second = api.get("jobs.batch", "r", namespace=OTHER)
        assert second["metadata"]["uid"] != first["metadata"]["uid"]
        containers = [j["spec"]["template"]["spec"]["containers"] for j in (first, second)]
        assert containers[0] == containers[1], "the same run again"

        api.remove("pods", "r-0-done", namespace=OTHER)
        lost = advice(drill.tita("jobs", "logs", "r", "-n", OTHER).stderr)
        store = drill.store(OTHER).uri
        assert lost == ["tita jobs status r -n tita2", f"tita runs show r --store {store}"]
        drill.follow(lost[0])
        assert "0.2" in drill.follow(lost[1])

        # Without its Job, the store of the release has the log, not that of the settings.
        api.objects.pop(("jobs.batch", OTHER, "r"))
        for namespace in (NAMESAKE, OTHER):
            log = gzip.compress(f"log of {namespace}".encode())
            drill.store(namespace).put("logs/r/1.log.gz", log)
        assert drill.tita("jobs", "logs", "r", "-n", OTHER).stdout == "log of tita2\n"
        api.put("jobs.batch", second)

        taken = drill.tita(*LAUNCH, "-n", OTHER)
        assert taken.returncode == ExitCode.USER
        assert advice(taken.stderr) == ["tita jobs delete r -n tita2"]
        drill.follow(advice(taken.stderr)[0])
        assert (("jobs.batch", OTHER, "r")) not in api.objects
        (unknown,) = advice(drill.tita("jobs", "cancel", "r", "-n", OTHER).stderr)
        assert unknown == "tita jobs list -n tita2"
        assert drill.follow(unknown) == ""

        api.on_job = None
        drill.tita(*LAUNCH, "--detach", "-n", OTHER)
        (delete,) = advice(drill.tita("jobs", "cancel", "r", "-n", OTHER).stderr)
        drill.follow(delete)
        assert (("jobs.batch", OTHER, "r")) not in api.objects

        drill.tita(*LAUNCH, "--detach", "-n", OTHER)
        job = api.get("jobs.batch", "r", namespace=OTHER)
        job["spec"]["suspend"] = True
        api.put("jobs.batch", job)
        drill.helm_api.put("jobs", job)
        (resume,) = advice(drill.tita("jobs", "status", "r", "-n", OTHER).stderr)
        drill.follow(resume)
        assert drill.helm_api.objects[key_of("jobs", "r", OTHER)]["spec"]["suspend"] is False

        none = drill.tita(*LAUNCH, "-n", "new")
        (install,) = advice(none.stderr)
        drill.follow(install)
        assert ("cronjobs.batch", "new", "tita-train-dpo") in api.objects


def complete(drill: Drill) -> Any:
    """What the cluster does with a Job: run it to its end."""
    api = drill.lab.api

    def act(job: dict[str, Any]) -> None:
        run, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        pod = api.pod(run, node="node-1", suffix="done", namespace=namespace)
        api.end_pod(pod, 0)
        api.job_over(run, "Complete", namespace=namespace)

    return act


def test_remedies_for_promotions_act_on_their_own_store(drill: Drill) -> None:
    stores = {namespace: drill.store(namespace).uri for namespace in (NAMESAKE, OTHER)}
    for namespace in (NAMESAKE, OTHER):
        for run in ("one", "two"):
            drill.put_run(namespace, run, beta=0.1)
            promote(drill.store(namespace), run)
    drill.environment["TITA_STORE"] = stores[NAMESAKE]
    with drill.namesake_untouched():
        wrong = drill.tita("promote", "one", "-n", OTHER)
        assert wrong.returncode == ExitCode.USER
        assert f"use --store {stores[OTHER]}" in wrong.stderr
        assert drill.promoted(OTHER) == "runs/two/model"

        act_as_controller(drill, ready=False)
        stuck = drill.tita("promote", "one", "-n", OTHER, "--store", stores[OTHER])
        assert stuck.returncode == ExitCode.FAILED
        assert drill.promoted(OTHER) == "runs/one/model"
        doctor, rollback = advice(stuck.stderr)
        assert doctor == "tita doctor -n tita2"
        drill.follow(doctor, code=ExitCode.USER)
        act_as_controller(drill, ready=True)
        drill.follow(rollback)
        assert drill.promoted(OTHER) == "runs/two/model"


def act_as_controller(drill: Drill, *, ready: bool) -> None:
    """Finish the next restart of inference, or let it exceed its deadline."""
    api = drill.lab.api

    def read() -> Any:
        return api.get("deployments.apps", "tita-inference", namespace=OTHER)

    before = read()["spec"]["template"]

    def act() -> None:
        drill.lab.until(lambda: read()["spec"]["template"] != before, timeout_s=60.0)
        item = read()
        number = {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
        item["status"] = number | {"observedGeneration": item["metadata"].get("generation", 0)}
        if not ready:
            late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
            item["status"] |= {"conditions": [late], "updatedReplicas": 0}
        api.put("deployments.apps", item)

    threading.Thread(target=act, daemon=True).start()


def test_remedies_for_components_act_on_their_own_namespace(drill: Drill) -> None:
    for namespace in (NAMESAKE, OTHER):
        drill.start_pods(namespace)
    with drill.namesake_untouched():
        objects = drill.helm_api.objects
        store, inference = (
            objects[key_of("statefulsets", "tita-s3", OTHER)],
            objects[key_of("deployments", "tita-inference", OTHER)],
        )

        store["spec"]["replicas"] = 0
        (scale,) = doctors_advice(drill, "StatefulSet tita-s3 is scaled to 0")
        drill.follow(scale)
        assert objects[key_of("statefulsets", "tita-s3", OTHER)]["spec"]["replicas"] == 1

        drill.sync()
        drill.start_pods(OTHER)
        inference["spec"]["paused"] = True
        inference["spec"]["replicas"] = 2
        (resume,) = doctors_advice(drill, "Deployment tita-inference has 1 of 2 pods: it is paused")
        drill.follow(resume)
        resumed = objects[key_of("deployments", "tita-inference", OTHER)]
        assert not resumed["spec"].get("paused")
        (describe,) = doctors_advice(drill, "Deployment tita-inference has 1 of 2 pods")
        assert "2 desired" in drill.follow(describe)
        resumed["spec"]["replicas"] = 1

        for key in (key_of("statefulsets", "tita-s3", OTHER), CLAIM):
            uid = objects.pop(key)["metadata"]["uid"]
            drill.sync()
            drill.start_pods(OTHER, s3=WAITING)
            (upgrade,) = doctors_advice(drill, "does not exist", "there is no claim 'tita-s3'")
            assert upgrade == UPGRADE
            drill.follow(upgrade)
            assert objects[key]["metadata"]["uid"] != uid
            drill.start_pods(OTHER)
            assert drill.doctor(OTHER)[0]

        # No storage class: the claim is replaced by one with a class.
        put_status(drill, phase="Pending")
        drill.start_pods(OTHER, s3=WAITING)
        delete, classes = doctors_advice(drill, "claim tita-s3 is not bound: no storage class")
        drill.follow(delete)
        assert CLAIM not in objects
        drill.follow(classes)
        setting = "s3.embedded.persistence.storageClass=fast"
        drill.follow(f"{UPGRADE} --set {setting}")
        assert objects[CLAIM]["spec"]["storageClassName"] == "fast"

        # A claim that is being deleted: the chart refuses it until it is gone.
        objects[CLAIM]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        drill.sync()
        show, upgrade = doctors_advice(drill, "claim tita-s3 is being deleted")
        assert "tita-s3" in drill.follow(show)
        drill.follow(upgrade, code=1)
        del objects[CLAIM]
        drill.follow(upgrade)
        assert objects[CLAIM]["spec"]["storageClassName"] == "fast", "it keeps the values"

        # A container that crashes, with and without last words.
        ended = {"exitCode": 2, "reason": "Error", "message": "loading\nbase: not a tree; push it"}
        state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
        crash = {"name": "tita", "restartCount": 4, "lastState": {"terminated": ended}}
        crash["state"] = state
        crashed = {"phase": "Running", "containerStatuses": [crash]}
        drill.start_pods(OTHER, inference=crashed)
        assert doctors_advice(drill, "base: not a tree; push it") == []
        del ended["message"]
        drill.start_pods(OTHER, inference=crashed)
        for namespace in (NAMESAKE, OTHER):
            pod = drill.lab.api.get("pods", "tita-inference-0", namespace=namespace)
            drill.helm_api.put("pods", pod | {"log": f"log of {namespace}"})
        (logs,) = doctors_advice(drill, "4 restarts, the last after exit code 2")
        assert drill.follow(logs) == "log of tita2"


def doctors_advice(drill: Drill, *expected: str) -> list[str]:
    """What doctor recommends for the other namespace, where it finds one of these faults."""
    if any(POD_OF in o["metadata"].get("labels", {}) for o in drill.lab.api.objects.values()):
        drill.sync()
    lines = drill.doctor(OTHER)[1]
    assert any(words in lines for words in expected), lines
    return advice(lines)


def put_status(drill: Drill, **status: Any) -> None:
    claim = drill.lab.api.get("persistentvolumeclaims", "tita-s3", namespace=OTHER)
    drill.lab.api.put("persistentvolumeclaims", claim | {"status": status})
