"""From a request to a Job: shapes, overrides of the template, and refusals."""

import json
from typing import Any

import pytest
from fake_api import Refusal

from tita.errors import TitaError, Unreachable
from tita.launch.objects import main_container, plain_environment
from tita.launch.submit import LaunchRequest, find_template, plan, submit
from tita.launch.template import JobShape, check_run_name, new_run_name, resolve_shape

EIGHTS = JobShape(nodes=1, gpus_per_node=8)


@pytest.mark.parametrize(
    ("gpus", "nodes", "expected"),
    [
        (None, None, (1, 8)), (None, 3, (3, 8)), (4, None, (1, 4)), (8, None, (1, 8)),
        (16, None, (2, 8)), (16, 4, (4, 4)), (0, None, (1, 0)), (0, 2, (2, 0)),
    ],
)  # fmt: skip
def test_shapes(gpus: int | None, nodes: int | None, expected: tuple[int, int]) -> None:
    shape = resolve_shape(EIGHTS, gpus=gpus, nodes=nodes)
    assert (shape.nodes, shape.gpus_per_node) == expected


@pytest.mark.parametrize(
    ("gpus", "nodes", "nearest"), [(12, None, "8 or 16"), (7, 2, "6 or 8"), (1, 2, "2")]
)
def test_gpus_that_do_not_divide(gpus: int, nodes: int | None, nearest: str) -> None:
    with pytest.raises(TitaError, match=f"use {nearest}$"):
        resolve_shape(EIGHTS, gpus=gpus, nodes=nodes)


def test_job_of_one_node(lab: Any) -> None:
    """Such as `tita launch selftest --gpus 8`; its template has one GPU."""
    template = find_template(lab.cluster, "selftest")
    request = LaunchRequest(job="selftest", run="r", recipe={}, gpus=8)
    _, shape = plan(request, template)
    assert shape == JobShape(nodes=1, gpus_per_node=8)
    for job, nodes in (("selftest", 8), ("benchmark", 2)):
        request = LaunchRequest(job=job, run="r", recipe={}, nodes=nodes)
        with pytest.raises(TitaError, match=f"--nodes {nodes}: this job runs on one node; omit it"):
            plan(request, find_template(lab.cluster, job))


def test_job_without_gpus() -> None:
    with pytest.raises(TitaError, match="uses no GPUs"):
        resolve_shape(JobShape(nodes=1, gpus_per_node=0), gpus=2)


@pytest.mark.parametrize("name", ["Run", "a_b", "-a", "a-", "", "a" * 58, "a.b"])
def test_invalid_names(name: str) -> None:
    with pytest.raises(TitaError):
        check_run_name(name)


def test_generated_names() -> None:
    names = {check_run_name(new_run_name("train-dpo")) for _ in range(50)}
    assert len(names) > 45


def job_of(lab: Any, **more: Any) -> Any:
    request = {"job": "train-dpo", "run": "r", "recipe": {}} | more
    manifest, _ = plan(LaunchRequest(**request), find_template(lab.cluster, request["job"]))
    return manifest


def test_run_without_options_equals_the_template(lab: Any) -> None:
    """As `kubectl create job --from=cronjob/...` makes it."""
    template = lab.api.get("cronjobs.batch", "tita-train-dpo")["spec"]["jobTemplate"]
    manifest = job_of(lab)
    assert manifest["spec"] == template["spec"]
    assert manifest["metadata"]["labels"] == template["metadata"]["labels"]
    assert "ownerReferences" not in manifest["metadata"]


def test_options_override_the_template(lab: Any) -> None:
    manifest = job_of(lab, recipe={"beta": 0.2}, gpus=8, queue="q", image="other:1")
    spec = manifest["spec"]
    container = main_container(spec["template"])
    environment = plain_environment(container)
    assert (spec["parallelism"], spec["completions"], spec["suspend"]) == (2, 2, True)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert (environment["TITA_NUM_NODES"], environment["TITA_PROCS_PER_NODE"]) == ("2", "4")
    assert json.loads(environment["TITA_RECIPE"]) == {"beta": 0.2}
    assert container["image"] == "other:1"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert submit(lab.cluster, manifest)["metadata"]["uid"]


def test_zero_gpus_removes_the_resource(lab: Any) -> None:
    container = main_container(job_of(lab, gpus=0)["spec"]["template"])
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert plain_environment(container)["TITA_PROCS_PER_NODE"] == "1"


def test_recipe_is_merged_with_the_release_s(lab: Any) -> None:
    cron_job = lab.api.get("cronjobs.batch", "tita-train-dpo")
    container = main_container(cron_job["spec"]["jobTemplate"]["spec"]["template"])
    for entry in container["env"]:
        if entry["name"] == "TITA_RECIPE":
            entry["value"] = '{"beta": 0.3, "lora": {"rank": 8}}'
    lab.api.put("cronjobs.batch", cron_job)
    manifest = job_of(lab, recipe={"lora": {"alpha": 4}})
    recipe = plain_environment(main_container(manifest["spec"]["template"]))["TITA_RECIPE"]
    assert json.loads(recipe) == {"beta": 0.3, "lora": {"rank": 8, "alpha": 4}}
    with pytest.raises(TitaError, match="did you mean 'rank'"):
        job_of(lab, recipe={"lora": {"rnk": 4}})


def test_release_selection(lab: Any) -> None:
    with pytest.raises(TitaError, match=r"no release 'other'.*; set --release tita"):
        find_template(lab.cluster, "train-dpo", release="other")
    second = lab.api.get("cronjobs.batch", "tita-train-dpo")
    second["metadata"] |= {"name": "b-train-dpo", "uid": "b"}
    second["metadata"]["labels"]["app.kubernetes.io/instance"] = "b"
    lab.api.put("cronjobs.batch", second)
    with pytest.raises(TitaError, match="set --release b or --release tita"):
        find_template(lab.cluster, "train-dpo")
    assert find_template(lab.cluster, "train-dpo", release="b").name == "b-train-dpo"
    for name in ("b-train-dpo", "tita-train-dpo"):
        lab.api.remove("cronjobs.batch", name)
    with pytest.raises(TitaError, match="helm install"):
        find_template(lab.cluster, "train-dpo")


def test_lost_response_creates_one_job(lab: Any) -> None:
    lab.api.lost_answers = 1
    submit(lab.cluster, job_of(lab))
    posts = [line for line in lab.api.requests if line.startswith("POST")]
    assert len(posts) == 2
    assert lab.api.get("jobs.batch", "r")


def test_name_that_is_taken(lab: Any) -> None:
    submit(lab.cluster, job_of(lab))
    with pytest.raises(TitaError, match="run 'r' already exists"):
        submit(lab.cluster, job_of(lab))


def test_exceeded_job_quota(lab: Any) -> None:
    manifest = job_of(lab)
    words = 'jobs.batch "r" is forbidden: exceeded quota: q, requested: count/jobs.batch=1'
    lab.api.refusals += [Refusal(403, "Forbidden", words)]
    with pytest.raises(TitaError, match=r"exceeded quota.*raise the namespace's ResourceQuota"):
        submit(lab.cluster, manifest)


def test_dry_run_creates_nothing(lab: Any) -> None:
    submit(lab.cluster, job_of(lab), dry_run=True)
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_unknown_field(lab: Any) -> None:
    manifest = job_of(lab)
    manifest["spec"]["paralelism"] = 2
    with pytest.raises(TitaError, match="paralelism"):
        submit(lab.cluster, manifest)


def test_busy_api_is_retried(lab: Any) -> None:
    manifest = job_of(lab)
    conflict = "Operation cannot be fulfilled on resourcequotas: the object has been modified"
    lab.api.refusals += [
        Refusal(429, "TooManyRequests", "too many requests", retry_after=0),
        Refusal(409, "Conflict", conflict),
    ]
    assert submit(lab.cluster, manifest)["metadata"]["name"] == "r"


def test_busy_api_until_attempts_run_out(lab: Any) -> None:
    lab.api.refusals += [Refusal(503, "ServiceUnavailable", "etcd is away") for _ in range(3)]
    with pytest.raises(Unreachable, match="etcd is away"):
        find_template(lab.cluster, "train-dpo")


def test_connection_refused(lab: Any) -> None:
    lab.api.stop()
    with pytest.raises(Unreachable, match="does not answer"):
        find_template(lab.cluster, "train-dpo")


def test_invalid_token_is_not_shown(lab: Any) -> None:
    lab.cluster.access.client.configuration.api_key["BearerToken"] = "Bearer s3cret\nX: y"
    with pytest.raises(TitaError, match=r"not a valid HTTP header; log in") as caught:
        lab.cluster.get("/version")
    assert "s3cret" not in str(caught.value)
