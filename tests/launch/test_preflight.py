"""Checks before a launch, and those of `tita doctor`."""

from typing import Any

import pytest
from botocore.exceptions import ClientError

from tita.launch.doctor import run_doctor
from tita.launch.objects import main_container
from tita.launch.preflight import (
    CheckResult,
    CheckStatus,
    check_api,
    check_job,
    check_rights,
    check_store,
    run_checks,
)
from tita.launch.submit import LaunchRequest, find_template, plan
from tita.settings import settings
from tita.storage import open_store


def findings(lab: Any, **more: Any) -> dict[str, CheckResult]:
    template = find_template(lab.cluster, "train-dpo")
    manifest, _ = plan(LaunchRequest(job="train-dpo", run="r", recipe={}, **more), template)
    looks = check_job(lab.cluster, template, manifest)
    return {found.check: found for found in run_checks(looks)}


def test_all_checks_pass(lab: Any) -> None:
    assert check_api(lab.cluster).mark is CheckStatus.OK
    assert check_rights(lab.cluster).mark is CheckStatus.OK
    assert {found.mark for found in findings(lab).values()} == {CheckStatus.OK}


def test_missing_permissions(lab: Any) -> None:
    lab.api.denied |= {("create", "jobs.batch"), ("get", "pods/log")}
    found = check_rights(lab.cluster)
    assert found.mark is CheckStatus.BAD
    assert "may not create jobs.batch, get pods/log in namespace lab" in str(found)


def test_too_many_gpus_per_node(lab: Any) -> None:
    found = findings(lab, gpus=8, nodes=1)["nodes"]
    assert found.mark is CheckStatus.BAD
    assert found.text == "0 of 2 nodes can hold a pod with 8 GPUs; the largest has 4"


def test_too_many_pods(lab: Any) -> None:
    assert "use at most --gpus 8" in str(findings(lab, gpus=12)["nodes"])


def test_tainted_and_cordoned_nodes_do_not_count(lab: Any) -> None:
    for name, spec in (
        ("node-1", {"unschedulable": True}),
        ("node-2", {"taints": [{"key": "team", "value": "x", "effect": "NoSchedule"}]}),
    ):
        lab.api.put("nodes", lab.api.get("nodes", name) | {"spec": spec})
    found = findings(lab)["nodes"]
    assert "exclude 2 of them" in found.text
    assert "jobs.tolerations" in found.remedy
    assert "fewer" not in found.remedy


def test_a_node_that_has_just_joined_holds_nothing(lab: Any) -> None:
    """An autoscaler adds it; its kubelet has not said yet what it has."""
    lab.api.put("nodes", {"metadata": {"name": "node-3"}, "spec": {}, "status": {}})
    found = findings(lab)["nodes"]
    assert (found.mark, found.text) == (CheckStatus.OK, "2 of 3 nodes can hold a pod with 4 GPUs")


def test_forbidden_check_is_unknown(lab: Any) -> None:
    lab.api.denied.add(("list", "nodes"))
    assert findings(lab)["nodes"].mark is CheckStatus.UNKNOWN


def test_missing_objects(lab: Any) -> None:
    lab.api.remove("serviceaccounts", "tita")
    cron_job = lab.api.get("cronjobs.batch", "tita-train-dpo")
    pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    pod["priorityClassName"] = "high"
    ref = {"name": "s3-keys", "key": "id"}
    main_container({"spec": pod})["env"].append(
        {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": ref}}
    )
    pod["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "models"}})
    lab.api.put("cronjobs.batch", cron_job)
    found = findings(lab, queue="gpus")
    for check, name in {
        "service account": "tita", "secrets": "s3-keys", "claims": "models",
        "priority class": "high", "queue": "gpus",
    }.items():  # fmt: skip
        assert found[check].mark is CheckStatus.BAD, check
        assert name in found[check].text
        assert found[check].remedy


def test_doctor_checks_every_job_and_the_store(lab: Any, tmp_path: Any) -> None:
    for job in ("train-dpo", "build-pairs", "benchmark"):
        cron_job = lab.api.get("cronjobs.batch", f"tita-{job}")
        pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]
        for entry in main_container(pod)["env"]:
            if entry["name"] == "TITA_STORE":
                entry["value"] = str(tmp_path / "store")
        lab.api.put("cronjobs.batch", cron_job)
    told: list[CheckResult] = []
    good = run_doctor(lab.cluster, release=None, report=told.append)
    assert [found for found in told if found.mark is CheckStatus.BAD] == []
    assert good
    assert {"api", "rights", "benchmark", "build-pairs", "train-dpo", "store"} <= {
        found.check for found in told
    }
    assert "conditional write" in told[-1].text


def test_doctor_reports_an_aws_configuration_that_is_not_valid(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "typo")
    told: list[CheckResult] = []
    assert not run_doctor(lab.cluster, release=None, report=told.append)
    assert (told[-1].check, told[-1].mark) == ("store", CheckStatus.BAD)
    assert "AWS configuration is not valid (ProfileNotFound); check AWS_PROFILE" in str(told[-1])


def test_doctor_does_not_look_on_aws_for_the_bucket_of_another_server(lab: Any) -> None:
    for key, item in list(lab.api.objects.items()):
        if key[0] == "cronjobs.batch":
            pod = item["spec"]["jobTemplate"]["spec"]["template"]
            url = {"name": "TITA_S3_ENDPOINT_URL", "value": "http://tita-s3:8333"}
            main_container(pod)["env"].append(url)
            lab.api.put("cronjobs.batch", item)
    told: list[CheckResult] = []
    run_doctor(lab.cluster, release=None, report=told.append)
    assert (told[-1].check, told[-1].mark) == ("store", CheckStatus.UNKNOWN)
    assert "s3://my-bucket is on http://tita-s3:8333" in told[-1].text


@pytest.mark.parametrize(
    ("in_pods", "here", "remedy"),
    [
        ({"TITA_S3_ENCRYPTION": "aws:kms"}, {}, "set TITA_S3_ENCRYPTION=aws:kms to check it"),
        ({"TITA_S3_REQUESTER_PAYS": "true"}, {}, "set TITA_S3_REQUESTER_PAYS=true to check it"),
        ({}, {"TITA_S3_ENCRYPTION": "AES256"}, "unset TITA_S3_ENCRYPTION"),
        ({"TITA_S3_ENCRYPTION": "AES256"}, {"TITA_S3_ENCRYPTION": "AES256"}, None),
    ],
)
def test_doctor_does_not_write_otherwise_than_the_pods(
    lab: Any,
    monkeypatch: pytest.MonkeyPatch,
    s3_environment: dict[str, str],
    in_pods: dict[str, str],
    here: dict[str, str],
    remedy: str | None,
) -> None:
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    of_pods = {"TITA_STORE": s3_environment["TITA_STORE"], **in_pods}
    for key, item in list(lab.api.objects.items()):
        if key[0] == "cronjobs.batch":
            container = main_container(item["spec"]["jobTemplate"]["spec"]["template"])
            container["env"] = [e for e in container["env"] if e["name"] not in of_pods]
            container["env"] += [{"name": n, "value": v} for n, v in of_pods.items()]
            lab.api.put("cronjobs.batch", item)
    told: list[CheckResult] = []
    run_doctor(lab.cluster, release=None, report=told.append)
    expected = CheckStatus.OK if remedy is None else CheckStatus.UNKNOWN
    assert (told[-1].check, told[-1].mark) == ("store", expected)
    assert told[-1].remedy == (remedy or "")


def test_read_only_store(tmp_path: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert check_store(str(blocked)).mark is CheckStatus.BAD


def test_store_without_the_right_to_delete_is_usable(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied"}}, "DeleteObject")

    def open_denied(uri: str) -> Any:
        store = open_store(uri)
        events = store._bucket._client.meta.events  # type: ignore[attr-defined]
        events.register("before-call.s3.DeleteObject", deny)
        return store

    monkeypatch.setattr("tita.launch.preflight.open_store", open_denied)
    found = check_store(s3_environment["TITA_STORE"])
    assert found.mark is CheckStatus.UNKNOWN
    assert "conditional write, but not delete (access denied)" in found.text
