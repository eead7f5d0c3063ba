"""Rendered objects are consistent with each other, the image, the CLI and the exit codes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.main import get_command

import tita
from tita.align.forms import FORMS, VIEW_FORMS
from tita.cli.commands import app
from tita.cli.engine_arguments import EngineChoice
from tita.cli.guidance_options import parse_rewards, parse_weights
from tita.cli.infer import Dtype
from tita.errors import IGNORED, ExitCode
from tita.jobspec import job_names, load_job
from tita.serve.metrics import Metrics
from tita.settings import Settings

KEDA = {"inference.autoscaling.kind": "keda"}


def test_every_job_file_has_a_cronjob(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    cronjobs = [o for o in objects if o["kind"] == "CronJob"]
    assert sorted(o["metadata"]["labels"]["tita.dev/job"] for o in cronjobs) == job_names()
    for name in job_names():
        spec = load_job(name)
        cronjob = chart.find(objects, "CronJob", f"tita-{name}")["spec"]
        job = cronjob["jobTemplate"]["spec"]
        assert job["activeDeadlineSeconds"] == spec.deadline_seconds
        assert job["backoffLimit"] == spec.tries * job["parallelism"]
        assert cronjob["suspend"] or cronjob["schedule"] == spec.schedule
        (container,) = job["template"]["spec"]["containers"]
        assert container["args"] == [name]


def test_selectors_match_pods(chart: SimpleNamespace, objects: list[dict[str, Any]]) -> None:
    pods = [pod["metadata"]["labels"] for _, pod in chart.pod_templates(objects)]
    for o in objects:
        spec = o.get("spec", {})
        selector = spec.get("selector", spec.get("podSelector"))
        if o["kind"] == "ServiceMonitor":
            targets = [s["metadata"]["labels"] for s in objects if s["kind"] == "Service"]
        else:
            targets = pods
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= labels.items() for labels in targets), o["metadata"]


def test_selectors_contain_no_mutable_labels(objects: list[dict[str, Any]]) -> None:
    for o in objects:
        if o["kind"] in ("Deployment", "StatefulSet"):
            keys = o["spec"]["selector"]["matchLabels"].keys()
            assert {k.removeprefix("app.kubernetes.io/") for k in keys} == {
                "name", "instance", "component",
            }  # fmt: skip
            assert "volumeClaimTemplates" not in o["spec"]


def test_services_and_probes_use_declared_ports(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    pods = chart.pod_templates(objects)
    for service in (o for o in objects if o["kind"] == "Service"):
        behind = [
            {port["name"] for c in pod["spec"]["containers"] for port in c.get("ports", [])}
            for _, pod in pods
            if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        ]
        assert behind
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in names for names in behind)
    for where, container in chart.containers(objects):
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                found = container[probe]
                action = found.get("httpGet") or found.get("tcpSocket")
                # Only a program in the container can check a port on loopback.
                assert action["port"] in ports if action else found["exec"], f"{where} {probe}"


def test_ingress_route_and_autoscaler_target_the_service(chart: SimpleNamespace) -> None:
    objects = chart.render(files=("full",))
    service = chart.find(objects, "Service", "tita-inference")["spec"]["ports"][0]
    (rule,) = chart.find(objects, "Ingress", "tita-inference")["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "tita-inference", "port": {"name": service["name"]}}
    (rule,) = chart.find(objects, "HTTPRoute", "tita-inference")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "tita-inference", "port": service["port"]}]
    for values in ({}, KEDA):
        scaled = [o for o in chart.render(values, files=("full",)) if "scaleTargetRef" in str(o)]
        assert [o["spec"]["scaleTargetRef"]["name"] for o in scaled] == ["tita-inference"]


def test_every_volume_is_mounted_and_every_claim_exists(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    claims = {o["metadata"]["name"] for o in objects if o["kind"] == "PersistentVolumeClaim"}
    for where, pod in chart.pod_templates(objects):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounted = {m["name"] for c in pod["spec"]["containers"] for m in c["volumeMounts"]}
        assert mounted == set(volumes), where
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in claims | {"models"}, where


def test_app_version_and_image_tag_are_the_package_version(chart: SimpleNamespace) -> None:
    about = yaml.safe_load((chart.path / "Chart.yaml").read_text())
    assert about["appVersion"] == tita.__version__
    for where, container in chart.containers(chart.render()):
        assert container["image"] == f"tita:{tita.__version__}", where


def test_every_tita_variable_is_a_setting(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    known = {f"TITA_{field.upper()}" for field in Settings.model_fields}
    for where, container in chart.containers(objects):
        names = [entry["name"] for entry in container.get("env", [])]
        assert len(names) == len(set(names)), where
        assert {name for name in names if name.startswith("TITA_")} <= known, where


def test_settings_parse_the_environment_of_a_job(
    chart: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cronjob = chart.find(chart.render(files=("full",)), "CronJob", "tita-train-dpo")
    (container,) = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    in_pod = {
        "TITA_RUN": "my-run",
        "TITA_LAUNCH_UID": "8a1e",
        "TITA_NODE_RANK": "1",
        "TITA_NAMESPACE": "lab",
    }
    for name, value in chart.environment(container).items():
        if name.startswith("TITA_"):
            text = value if isinstance(value, str) else in_pod[name]
            monkeypatch.setenv(name, re.sub(r"\$\((\w+)\)", lambda m: in_pod[m[1]], text))
    found = Settings()
    assert found.store == "s3://my-bucket/tita"
    assert found.s3_endpoint_url == "https://s3.example"
    assert found.s3_path_style
    assert (found.s3_encryption, found.s3_kms_key_id) == ("aws:kms", "alias/my-bucket")
    assert found.s3_requester_pays
    assert (found.num_nodes, found.node_rank, found.procs_per_node) == (2, 1, 8)
    assert (found.master_addr, found.master_port) == ("my-run-0.tita-jobs", 29500)
    assert found.recipe == '{"beta":0.2}'


def parse(arguments: list[str]) -> dict[str, Any]:
    """Parse the arguments of a container with the CLI; raises for unknown commands and options."""
    command, *options = arguments
    commands = get_command(app).commands  # type: ignore[attr-defined]
    parameters: dict[str, Any] = commands[command].make_context(command, options).params
    return parameters


def test_job_arguments_are_parsed_by_the_cli(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    for where, container in chart.containers(objects):
        if where.startswith("CronJob/"):
            parse(container["args"])


def test_inference_arguments_are_parsed_by_the_cli(chart: SimpleNamespace) -> None:
    values = {
        "inference.weight": 0.5,
        "inference.reference": "reward/start",
        "inference.form": "dpo",
        "inference.plausibility": 0,
        "inference.dtype": "bfloat16",
        "inference.maxBatch": 2000000,
        "inference.extraArgs": ["--max-drafts=0"],
    }
    deployment = chart.find(chart.render(values, files=("full",)), "Deployment", "tita-inference")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    parsed = parse(container["args"])
    assert (parsed["base"], parsed["reward"]) == ("base", ["reward/current"])
    assert (parsed["reference"], parsed["form"]) == ("reward/start", "dpo")
    assert (parsed["weight"], parsed["plausibility"]) == (["0.5"], 0)
    assert (parsed["dtype"], parsed["max_batch"]) == ("bfloat16", 2000000)
    assert (parsed["name"], parsed["max_drafts"]) == ("tita", 0)
    assert "--plausibility=0" in container["args"]


def test_arguments_and_limits_of_engine_vllm(chart: SimpleNamespace) -> None:
    values = {
        "inference.engine": "vllm",
        "inference.vllm.tensorParallelSize": 2,
        "inference.vllm.pipelineParallelSize": 2,
        "inference.vllm.maxModelLen": 4096,
        "inference.vllm.gpuMemoryUtilization": 0.8,
        "inference.vllm.enforceEager": True,
    }
    deployment = chart.find(chart.render(values, files=("full",)), "Deployment", "tita-inference")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    parsed = parse(container["args"])
    assert (parsed["engine"], parsed["enforce_eager"]) == ("vllm", True)
    assert (parsed["tensor_parallel_size"], parsed["pipeline_parallel_size"]) == (2, 2)
    assert (parsed["max_model_len"], parsed["gpu_memory_utilization"]) == (4096, 0.8)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 3600
    assert deployment["spec"]["progressDeadlineSeconds"] > 3600
    # vLLM's workers have 15 s to exit after the answers are complete.
    assert 180 - 10 - parsed["grace_s"] >= 20
    written = chart.environment(container)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/cache" in mounts
    assert {written[name] for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")} == {
        "/cache/vllm", "/cache/triton",
    }  # fmt: skip
    plain = chart.find(chart.render(files=("full",)), "Deployment", "tita-inference")
    (other,) = plain["spec"]["template"]["spec"]["containers"]
    assert "VLLM_CACHE_ROOT" not in chart.environment(other)


def test_forms_that_engine_vllm_does_not_have_are_refused(chart: SimpleNamespace) -> None:
    for form in FORMS:
        values = {"inference.engine": "vllm", "inference.form": form, "inference.reference": "r"}
        done = chart.template(values, files=("full",))
        assert (done.returncode != 0) == (form in VIEW_FORMS), form
        assert (f"engine vllm does not have {form}" in done.stderr) == (form in VIEW_FORMS)


def test_several_reward_models_replace_the_one(chart: SimpleNamespace) -> None:
    values = {
        "inference.rewards.faithful": "runs/train-dpo-a1/model",
        "inference.rewards.brief": "reward/brief/current",
        "inference.weights.brief": 0.1,
    }
    deployment = chart.find(chart.render(values, files=("full",)), "Deployment", "tita-inference")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    parsed = parse(container["args"])
    named = {"brief": "reward/brief/current", "faithful": "runs/train-dpo-a1/model"}
    assert parse_rewards(parsed["reward"]) == (None, named)
    assert parse_weights(parsed["weight"]) == (None, {"brief": 0.1})


@pytest.mark.parametrize("value", ["form", "dtype", "engine"])
def test_the_schema_allows_what_the_cli_allows(chart: SimpleNamespace, value: str) -> None:
    schema = json.loads((chart.path / "values.schema.json").read_text())
    allowed = schema["properties"]["inference"]["properties"][value]["enum"]
    cli = {
        "form": ["", *FORMS],
        "dtype": ["", *Dtype],
        "engine": list(EngineChoice),
    }
    assert allowed == cli[value]


@pytest.mark.parametrize("grace", [60, 180, 900])
def test_grace_s_is_derived_from_the_grace_period(chart: SimpleNamespace, grace: int) -> None:
    values = {"inference.terminationGracePeriodSeconds": grace}
    deployment = chart.find(chart.render(values, files=("trial",)), "Deployment", "tita-inference")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    slept = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    (left,) = (a for a in container["args"] if a.startswith("--grace-s="))
    assert grace - 30 <= slept + int(left.partition("=")[2]) < grace


def test_the_server_exports_every_metric_of_the_chart(chart: SimpleNamespace) -> None:
    metrics = Metrics("tita")
    metrics.count_request("stop")
    served = {line.split("{")[0].split(" ")[0] for line in metrics.text().decode().splitlines()}
    values = yaml.safe_load((chart.path / "values.yaml").read_text())
    dashboard = (chart.path / "files" / "dashboard.json").read_text()
    named = set(re.findall(r"(tita:\w+)\{", dashboard))
    assert len(named) > 8
    assert named | {values["inference"]["autoscaling"]["metricName"]} <= served


def test_variables_are_defined_before_they_are_referenced(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    for where, container in chart.containers(objects):
        seen: set[str] = set()
        for entry in container.get("env", []):
            assert set(re.findall(r"\$\((\w+)\)", entry.get("value", ""))) <= seen, where
            seen.add(entry["name"])


def test_pod_failure_policy_matches_the_exit_codes(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    never = {
        ExitCode.USER, ExitCode.OUT_OF_MEMORY, ExitCode.GATE_MISSED, ExitCode.INCOMPLETE,
        ExitCode.DAMAGED, ExitCode.CONFLICT, ExitCode.NO_DEVICE, ExitCode.OUT_OF_TRIES,
        ExitCode.GANG_INCOMPLETE,
    }  # fmt: skip
    for cronjob in (o for o in objects if o["kind"] == "CronJob"):
        job = cronjob["spec"]["jobTemplate"]["spec"]
        disruption, fail, ignore = job["podFailurePolicy"]["rules"]
        assert disruption["action"] == "Ignore"
        assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert fail["action"] == "FailJob"
        assert set(fail["onExitCodes"]["values"]) == never
        assert ignore["action"] == "Ignore"
        assert set(ignore["onExitCodes"]["values"]) == IGNORED
        for rule in (fail, ignore):
            assert rule["onExitCodes"]["operator"] == "In"
            assert rule["onExitCodes"]["containerName"] == "tita"
        # The API requires both with a podFailurePolicy.
        assert job["podReplacementPolicy"] == "Failed"
        assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_exit_code_docstrings_match_the_policy() -> None:
    source = (Path(__file__).parents[2] / "tita" / "errors.py").read_text()
    docstrings = dict(re.findall(r'    (\w+) = \d+\n    """([^"]+)"""', source))
    assert {code for code, words in docstrings.items() if "Never retried" in words} == {
        "USER", "OUT_OF_MEMORY", "GATE_MISSED", "INCOMPLETE", "DAMAGED", "CONFLICT",
        "NO_DEVICE", "OUT_OF_TRIES", "GANG_INCOMPLETE",
    }  # fmt: skip
    assert {code for code, words in docstrings.items() if "not counted" in words} == {
        "RETRY", "LOST_PEER", "TERMINATED",
    }  # fmt: skip


def test_success_policy_is_rank_0_since_kubernetes_1_31(chart: SimpleNamespace) -> None:
    for kube, known in (("1.28", False), ("1.30", False), ("1.31", True), ("1.36", True)):
        for cronjob in (o for o in chart.render(kube=kube) if o["kind"] == "CronJob"):
            job = cronjob["spec"]["jobTemplate"]["spec"]
            assert job["completionMode"] == "Indexed"
            assert ("successPolicy" in job) is known


def test_workers_resolve_each_other(chart: SimpleNamespace, objects: list[dict[str, Any]]) -> None:
    service = chart.find(objects, "Service", "tita-jobs")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    for where, pod in chart.pod_templates(objects):
        if where.startswith("CronJob/"):
            assert pod["spec"]["subdomain"] == "tita-jobs"
            assert service["selector"].items() <= pod["metadata"]["labels"].items()


def test_torchrun_timeout_is_derived_from_the_grace_period(chart: SimpleNamespace) -> None:
    for where, pod in chart.pod_templates(chart.render()):
        if where.startswith("CronJob/"):
            env = chart.environment(pod["spec"]["containers"][0])
            patience = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
            assert 30 < patience < pod["spec"]["terminationGracePeriodSeconds"]


def test_the_dashboard_is_rendered_unchanged(chart: SimpleNamespace) -> None:
    data = chart.find(chart.render(files=("full",)), "ConfigMap", "tita-inference-dashboard")[
        "data"
    ]
    (text,) = data.values()
    dashboard = json.loads(text)
    assert dashboard == json.loads((chart.path / "files" / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) > 5
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert 'namespace="$namespace"' in target["expr"], panel["title"]
