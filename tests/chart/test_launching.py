"""Jobs that the launcher creates from the chart's templates are valid."""

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tita.errors import TitaError
from tita.jobspec import job_names
from tita.launch.submit import LaunchRequest, plan
from tita.launch.template import JobShape, JobTemplate, make_job


def launched(
    chart: SimpleNamespace, job: str, *, kube: str | None = None, **run: Any
) -> dict[str, Any]:
    objects = chart.render(files=("full",), kube=kube or chart.newest)
    template = JobTemplate(cron_job=chart.find(objects, "CronJob", f"tita-{job}"))
    return make_job(template, run="my-run", launch_id="x", **run)


@pytest.mark.parametrize("kube", ["1.28", "1.36"])
@pytest.mark.parametrize("job", job_names())
def test_a_launched_job_is_valid(chart: SimpleNamespace, job: str, kube: str) -> None:
    shape = JobShape(nodes=2, gpus_per_node=0 if job == "benchmark" else 4)
    made = launched(chart, job, kube=kube, shape=shape, recipe={"seed": 7}, queue="mine")
    kubernetes_validate.validate(made, kube, strict=True)


def test_the_run_overrides_the_template(chart: SimpleNamespace) -> None:
    shape = JobShape(nodes=3, gpus_per_node=4)
    made = launched(chart, "train-dpo", shape=shape, recipe={"seed": 7}, image="tita:mine")
    assert made["spec"]["completions"] == made["spec"]["parallelism"] == 3
    # Three tries of three nodes.
    assert made["spec"]["backoffLimit"] == 9
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert container["image"] == "tita:mine"
    env = chart.environment(container)
    assert (env["TITA_NUM_NODES"], env["TITA_PROCS_PER_NODE"]) == ("3", "4")
    assert env["TITA_GPUS"] == "4"
    assert env["TITA_RECIPE"] == '{"beta": 0.2, "seed": 7}'
    assert env["TITA_MASTER_ADDR"] == "$(TITA_RUN)-0.tita-jobs"


def test_the_template_has_shape_release_and_gpu_resource(chart: SimpleNamespace) -> None:
    cron_job = chart.find(chart.render(files=("full",)), "CronJob", "tita-train-dpo")
    template = JobTemplate(cron_job=cron_job)
    assert template.shape == JobShape(nodes=2, gpus_per_node=8)
    assert template.release == "tita"
    assert template.gpu_resource == "nvidia.com/gpu"


def test_a_run_with_trackers_is_submitted_with_their_secret(chart: SimpleNamespace) -> None:
    values = {"jobs.trackers.existingSecret": "keys", "image.trackers": ["mlflow"]}
    cron_job = chart.find(chart.render(values, files=("full",)), "CronJob", "tita-train-dpo")
    template = JobTemplate(cron_job=cron_job)

    def planned(*names: str, image: str | None = None) -> dict[str, Any]:
        recipe = {"report_to": names}
        return plan(LaunchRequest(job="train-dpo", run="r", recipe=recipe, image=image), template)[
            0
        ]

    made = planned("mlflow")
    kubernetes_validate.validate(made, chart.newest, strict=True)
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"][0] == {"secretRef": {"name": "keys"}}
    assert '"report_to": ["mlflow"]' in chart.environment(container)["TITA_RECIPE"]
    with pytest.raises(TitaError, match="the release's image has no wandb") as refused:
        planned("wandb", "mlflow")
    assert "image.trackers" in str(refused.value)
    # Another image may have it; its first pod checks.
    assert planned("wandb", image="tita:mine")


def test_launching_the_benchmark_keeps_its_endpoint(chart: SimpleNamespace) -> None:
    made = launched(
        chart, "benchmark", shape=JobShape(nodes=1, gpus_per_node=0), recipe={"max_questions": 5}
    )
    (container,) = made["spec"]["template"]["spec"]["containers"]
    recipe = chart.environment(container)["TITA_RECIPE"]
    assert '"base_url": "http://tita-inference:8000/v1"' in recipe
    assert '"max_questions": 5' in recipe


def test_the_documented_patch_adds_the_label_of_a_pod_group(
    chart: SimpleNamespace, tmp_path: Path
) -> None:
    """docs/cluster.md: coscheduling without Kueue."""
    document = (chart.root / "docs" / "cluster.md").read_text()
    (line,) = re.findall(r"^kubectl patch --local .*$", document, re.MULTILINE)
    words = shlex.split(line)
    assert words[-2:] == [">", "my-run.yaml"]
    shape = JobShape(nodes=2, gpus_per_node=8)
    made = launched(chart, "train-dpo", shape=shape, recipe={})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(made))
    tools = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir()
    done = subprocess.run(
        [tools / words[0], *words[1:-2]], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    patched = yaml.safe_load(done.stdout)
    kubernetes_validate.validate(patched, chart.newest, strict=True)
    (block,) = re.findall(r"```yaml\n([^`]*kind: PodGroup\n.*?)```", document, re.DOTALL)
    group = yaml.safe_load(block)
    labels = patched["spec"]["template"]["metadata"]["labels"]
    assert labels.pop("scheduling.x-k8s.io/pod-group") == group["metadata"]["name"]
    assert group["spec"]["minMember"] == made["spec"]["parallelism"]
    assert patched == made, "nothing else changes"
