"""Checks before a launch, and those of `tita doctor`."""

from typing import Any

from tita.launch.checks import doctor
from tita.launch.preflight import (
    Finding,
    Mark,
    check_api,
    check_job,
    check_rights,
    check_store,
    look_all,
)  # fmt: skip
from tita.launch.submit import Request, plan
from tita.launch.template import container_of, find_template


def findings(lab: Any, **more: Any) -> dict[str, Finding]:
    template = find_template(lab.cluster, "train-dpo")
    manifest, _ = plan(Request(job="train-dpo", run="r", recipe={}, **more), template)
    looks = check_job(lab.cluster, template, manifest)
    return {found.check: found for found in look_all(looks)}


def test_all_is_well(lab: Any) -> None:
    assert check_api(lab.cluster).mark is Mark.OK
    assert check_rights(lab.cluster).mark is Mark.OK
    assert {found.mark for found in findings(lab).values()} == {Mark.OK}


def test_rights_that_are_missing_are_named(lab: Any) -> None:
    lab.api.denied |= {("create", "jobs.batch"), ("get", "pods/log")}
    found = check_rights(lab.cluster)
    assert found.mark is Mark.BAD
    assert "may not create jobs.batch, get pods/log in namespace lab" in str(found)


def test_gpus_that_no_node_has(lab: Any) -> None:
    found = findings(lab, gpus=8, nodes=1)["nodes"]
    assert found.mark is Mark.BAD
    assert found.text == "0 of 2 nodes can hold a pod with 8 GPUs; the largest has 4"


def test_more_pods_than_there_is_room_for(lab: Any) -> None:
    assert "ask for at most --gpus 8" in str(findings(lab, gpus=12)["nodes"])


def test_tainted_and_cordoned_nodes_do_not_count(lab: Any) -> None:
    for name, spec in (
        ("node-1", {"unschedulable": True}),
        ("node-2", {"taints": [{"key": "team", "value": "x", "effect": "NoSchedule"}]}),
    ):
        lab.api.put("nodes", lab.api.get("nodes", name) | {"spec": spec})
    assert "close 2 of them to it" in findings(lab)["nodes"].text


def test_what_must_not_be_looked_at_is_no_fault(lab: Any) -> None:
    lab.api.denied.add(("list", "nodes"))
    assert findings(lab)["nodes"].mark is Mark.UNKNOWN


def test_things_that_are_missing(lab: Any) -> None:
    lab.api.remove("serviceaccounts", "tita")
    cron_job = lab.api.get("cronjobs.batch", "tita-train-dpo")
    pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    pod["priorityClassName"] = "high"
    ref = {"name": "s3-keys", "key": "id"}
    container_of({"spec": pod})["env"].append(
        {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": ref}}
    )
    pod["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "models"}})
    lab.api.put("cronjobs.batch", cron_job)
    found = findings(lab, queue="gpus")
    for check, name in {
        "service account": "tita", "secrets": "s3-keys", "claims": "models",
        "priority class": "high", "queue": "gpus",
    }.items():  # fmt: skip
        assert found[check].mark is Mark.BAD, check
        assert name in found[check].text
        assert found[check].remedy


def test_doctor_looks_at_every_job_and_the_store(lab: Any, tmp_path: Any) -> None:
    for job in ("train-dpo", "build-pairs", "benchmark"):
        cron_job = lab.api.get("cronjobs.batch", f"tita-{job}")
        pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]
        for entry in container_of(pod)["env"]:
            if entry["name"] == "TITA_STORE":
                entry["value"] = str(tmp_path / "store")
        lab.api.put("cronjobs.batch", cron_job)
    told: list[Finding] = []
    good = doctor(lab.cluster, release=None, tell=told.append)
    assert [found for found in told if found.mark is Mark.BAD] == []
    assert good
    assert {"api", "rights", "benchmark", "build-pairs", "train-dpo", "store"} <= {
        found.check for found in told
    }
    assert "conditional write" in told[-1].text


def test_store_that_cannot_be_written(tmp_path: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert check_store(str(blocked)).mark is Mark.BAD
