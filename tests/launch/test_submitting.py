"""From a request to a Job: shapes, what is laid over the template, refusals, and checks before."""

import json
from typing import Any

import pytest
from fake_api import Refusal

from tita.errors import ExitCode, TitaError, Unreachable
from tita.launch.checks import doctor
from tita.launch.names import check_run_name, new_run_name
from tita.launch.preflight import (
    Finding,
    Mark,
    check_api,
    check_job,
    check_rights,
    check_store,
    look_all,
)  # fmt: skip
from tita.launch.shape import Shape, shape_of
from tita.launch.submit import Request, plan, submit
from tita.launch.template import container_of, environment_of, find_template

EIGHTS = Shape(nodes=1, gpus_per_node=8)


@pytest.mark.parametrize(
    ("gpus", "nodes", "expected"),
    [
        (None, None, (1, 8)), (None, 3, (3, 8)), (4, None, (1, 4)), (8, None, (1, 8)),
        (16, None, (2, 8)), (16, 4, (4, 4)), (0, None, (1, 0)), (0, 2, (2, 0)),
    ],
)  # fmt: skip
def test_shapes(gpus: int | None, nodes: int | None, expected: tuple[int, int]) -> None:
    shape = shape_of(EIGHTS, gpus=gpus, nodes=nodes)
    assert (shape.nodes, shape.gpus_per_node) == expected


@pytest.mark.parametrize(
    ("gpus", "nodes", "nearest"), [(12, None, "8 or 16"), (7, 2, "6 or 8"), (1, 2, "2")]
)
def test_gpus_that_do_not_divide_name_the_nearest_that_do(
    gpus: int, nodes: int | None, nearest: str
) -> None:
    with pytest.raises(TitaError, match=f"ask for {nearest}$"):
        shape_of(EIGHTS, gpus=gpus, nodes=nodes)


def test_job_without_gpus_takes_none() -> None:
    with pytest.raises(TitaError, match="uses no GPUs"):
        shape_of(Shape(nodes=1, gpus_per_node=0), gpus=2)


@pytest.mark.parametrize("name", ["Run", "a_b", "-a", "a-", "", "a" * 58, "a.b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(TitaError):
        check_run_name(name)


def test_fresh_names_can_be_and_differ() -> None:
    names = {check_run_name(new_run_name("train-dpo")) for _ in range(50)}
    assert len(names) > 45


def job_of(lab: Any, **more: Any) -> Any:
    request = {"job": "train-dpo", "run": "r", "recipe": {}} | more
    manifest, _ = plan(Request(**request), find_template(lab.cluster, request["job"]))
    return manifest


def test_a_run_without_wishes_is_the_template(lab: Any) -> None:
    """As `kubectl create job --from=cronjob/...` makes it."""
    template = lab.api.get("cronjobs.batch", "tita-train-dpo")["spec"]["jobTemplate"]
    manifest = job_of(lab)
    assert manifest["spec"] == template["spec"]
    assert manifest["metadata"]["labels"] == template["metadata"]["labels"]
    assert "ownerReferences" not in manifest["metadata"]


def test_wishes_are_laid_over(lab: Any) -> None:
    manifest = job_of(lab, recipe={"beta": 0.2}, gpus=8, queue="q", image="other:1")
    spec = manifest["spec"]
    container = container_of(spec["template"])
    environment = environment_of(container)
    assert (spec["parallelism"], spec["completions"], spec["suspend"]) == (2, 2, True)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert (environment["TITA_NUM_NODES"], environment["TITA_PROCS_PER_NODE"]) == ("2", "4")
    assert json.loads(environment["TITA_RECIPE"]) == {"beta": 0.2}
    assert container["image"] == "other:1"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert submit(lab.cluster, manifest)["metadata"]["uid"]


def test_no_gpus_leave_no_trace_of_them(lab: Any) -> None:
    container = container_of(job_of(lab, gpus=0)["spec"]["template"])
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert environment_of(container)["TITA_PROCS_PER_NODE"] == "1"


def test_the_release_s_recipe_is_added_to(lab: Any) -> None:
    cron_job = lab.api.get("cronjobs.batch", "tita-train-dpo")
    container = container_of(cron_job["spec"]["jobTemplate"]["spec"]["template"])
    for entry in container["env"]:
        if entry["name"] == "TITA_RECIPE":
            entry["value"] = '{"beta": 0.3, "lora": {"rank": 8}}'
    lab.api.put("cronjobs.batch", cron_job)
    manifest = job_of(lab, recipe={"lora": {"alpha": 4}})
    recipe = environment_of(container_of(manifest["spec"]["template"]))["TITA_RECIPE"]
    assert json.loads(recipe) == {"beta": 0.3, "lora": {"rank": 8, "alpha": 4}}
    with pytest.raises(TitaError, match="did you mean 'rank'"):
        job_of(lab, recipe={"lora": {"rnk": 4}})


def test_release_is_found_or_asked_for(lab: Any) -> None:
    with pytest.raises(TitaError, match="helm install"):
        find_template(lab.cluster, "train-dpo", release="other")
    second = lab.api.get("cronjobs.batch", "tita-train-dpo")
    second["metadata"] |= {"name": "b-train-dpo", "uid": "b"}
    second["metadata"]["labels"]["app.kubernetes.io/instance"] = "b"
    lab.api.put("cronjobs.batch", second)
    with pytest.raises(TitaError, match="give --release b or --release tita"):
        find_template(lab.cluster, "train-dpo")
    assert find_template(lab.cluster, "train-dpo", release="b").name == "b-train-dpo"


def test_lost_answer_makes_one_job(lab: Any) -> None:
    lab.api.lost_answers = 1
    submit(lab.cluster, job_of(lab))
    posts = [line for line in lab.api.requests if line.startswith("POST")]
    assert len(posts) == 2
    assert lab.api.get("jobs.batch", "r")


def test_name_that_is_taken(lab: Any) -> None:
    submit(lab.cluster, job_of(lab))
    with pytest.raises(TitaError, match="there is a run 'r' already"):
        submit(lab.cluster, job_of(lab))


def test_dry_run_makes_nothing(lab: Any) -> None:
    submit(lab.cluster, job_of(lab), dry_run=True)
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_field_that_kubernetes_does_not_know(lab: Any) -> None:
    manifest = job_of(lab)
    manifest["spec"]["paralelism"] = 2
    with pytest.raises(TitaError, match="paralelism"):
        submit(lab.cluster, manifest)


def test_busy_api_is_asked_again(lab: Any) -> None:
    manifest = job_of(lab)
    conflict = "Operation cannot be fulfilled on resourcequotas: the object has been modified"
    lab.api.refusals += [
        Refusal(429, "TooManyRequests", "too many requests", retry_after=0),
        Refusal(409, "Conflict", conflict),
    ]
    assert submit(lab.cluster, manifest)["metadata"]["name"] == "r"


def test_api_that_is_busy_for_ever(lab: Any) -> None:
    lab.api.refusals += [Refusal(503, "ServiceUnavailable", "etcd is away") for _ in range(3)]
    with pytest.raises(Unreachable, match="etcd is away"):
        find_template(lab.cluster, "train-dpo")


def test_nobody_listens(lab: Any) -> None:
    lab.api.stop()
    with pytest.raises(Unreachable, match="gives no answer"):
        find_template(lab.cluster, "train-dpo")


# Checks before a launch.


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
    assert "2 are closed to it" in findings(lab)["nodes"].text


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


# The commands.


def test_command_refuses_before_it_asks(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--set", "betta=0.2")
    assert done.returncode == ExitCode.USER
    assert "did you mean 'beta'" in done.stderr


def test_command_prints_the_job(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--gpus", "8", "--dry-run", "-o", "json", "--name", "x")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"]["parallelism"] == 2
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_command_says_why_it_does_not_submit(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--gpus", "8", "--nodes", "1", "--detach")
    assert done.returncode == ExitCode.USER
    assert "0 of 2 nodes can hold a pod with 8 GPUs; the largest has 4" in done.stderr
    assert "not submitted" in done.stderr
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_command_without_a_cluster(lab: Any) -> None:
    lab.api.stop()
    typo = lab.cli("launch", "trian-dpo")
    assert typo.returncode == ExitCode.USER, "told before anything is asked"
    assert (
        "no job named 'trian-dpo'; choose one of benchmark, build-pairs, train-dpo" in typo.stderr
    )
    done = lab.cli("jobs", "list")
    assert done.returncode == ExitCode.UNREACHABLE
    assert "gives no answer" in done.stderr


def test_jobs_are_listed_shown_cancelled_and_deleted(lab: Any) -> None:
    made = lab.cli("launch", "train-dpo", "--name", "one", "--detach", "-o", "json")
    assert json.loads(made.stdout) == {"run": "one", "job": "train-dpo", "namespace": "lab"}
    listed = json.loads(lab.cli("jobs", "list", "-o", "json").stdout)
    assert [(row["run"], row["job"]) for row in listed] == [("one", "train-dpo")]
    pod = lab.api.pod("one")
    lab.api.waiting(pod, "ErrImagePull", "denied")
    shown = lab.cli("jobs", "status", "one")
    assert "ErrImagePull" in shown.stdout + shown.stderr
    assert lab.cli("jobs", "cancel", "one").returncode == 0
    assert lab.api.get("jobs.batch", "one")["spec"]["activeDeadlineSeconds"] == 1
    lab.api.job_over("one", "Failed", reason="DeadlineExceeded")
    told = lab.cli("jobs", "status", "one").stderr
    assert "one was cancelled" in told
    assert "activeDeadlineSeconds" not in told
    assert " cancelled " in lab.cli("jobs", "list").stdout
    assert lab.cli("jobs", "delete", "one").returncode == 0
    assert lab.cli("jobs", "status", "one").returncode == ExitCode.USER
