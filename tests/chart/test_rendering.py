"""What the chart renders is valid, strictly, and fits together where no schema looks."""

import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

import tita
from tita.errors import ExitCode
from tita.jobspec import job_names, load_job
from tita.settings import Settings

FILES = ("default", "full", "trial")
# Custom resources; kubernetes-validate has the schemas of Kubernetes' own.
CUSTOM = {"HTTPRoute", "ServiceMonitor", "ScaledObject"}
KEDA = {"inference.autoscaling.kind": "keda"}
QUANTITY = re.compile(r"^\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")
DNS_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")


@pytest.fixture(params=FILES)
def objects(request: pytest.FixtureRequest, chart: SimpleNamespace) -> list[dict[str, Any]]:
    rendered: list[dict[str, Any]] = chart.render(files=(request.param,))
    return rendered


@pytest.mark.parametrize("kube", ["1.28", "1.31", "1.36"])
@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize("files", FILES)
def test_every_object_is_valid_strictly(
    chart: SimpleNamespace, files: str, major: str, kube: str
) -> None:
    for o in chart.render(files=(files,), major=major, kube=kube):
        if o["kind"] not in CUSTOM:
            kubernetes_validate.validate(o, kube, strict=True)


def test_the_validator_refuses_what_is_wrong(chart: SimpleNamespace) -> None:
    deployment = chart.find(chart.render(files=("trial",)), "Deployment", "tita-inference")
    deployment["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, chart.newest, strict=True)


@pytest.mark.parametrize("files", FILES)
def test_helm_3_and_4_render_the_same(chart: SimpleNamespace, files: str) -> None:
    def without_chance(major: str) -> list[dict[str, Any]]:
        objects = chart.render(files=(files,), major=major)
        return [o for o in objects if o["kind"] != "Secret"]

    def order(o: dict[str, Any]) -> tuple[str, str]:
        return o["kind"], o["metadata"]["name"]

    assert sorted(without_chance("3"), key=order) == sorted(without_chance("4"), key=order)


@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize("files", FILES)
def test_lint_is_content(chart: SimpleNamespace, files: str, major: str) -> None:
    values = chart.path / "ci" / f"{files}-values.yaml"
    done = chart.run_helm("lint", "--strict", str(chart.path), "--values", str(values), major=major)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_older_kubernetes_is_refused(chart: SimpleNamespace) -> None:
    done = chart.template(kube="1.27")
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr


@pytest.mark.parametrize("major", ["3", "4"])
def test_a_packaged_chart_carries_the_jobs(
    chart: SimpleNamespace, tmp_path: Path, major: str
) -> None:
    done = chart.run_helm("package", str(chart.path), "--destination", str(tmp_path), major=major)
    assert done.returncode == 0, done.stderr
    packaged = chart.template(major=major, chart=next(tmp_path.glob("*.tgz")))
    assert packaged.returncode == 0, packaged.stderr
    assert packaged.stdout == chart.template(major=major).stdout


def test_names_are_unique_and_legal(objects: list[dict[str, Any]]) -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names))
    for kind, name in names:
        assert DNS_LABEL.match(name), f"{kind} {name}"


def test_long_names_are_cut_to_what_kubernetes_takes(chart: SimpleNamespace) -> None:
    for o in chart.render(files=("trial",), release="a" * 53):
        # The CronJob controller appends eleven characters of its own to a Job's name.
        limit = 52 if o["kind"] == "CronJob" else 63
        assert len(o["metadata"]["name"]) <= limit, o["metadata"]["name"]
        assert DNS_LABEL.match(o["metadata"]["name"])


def test_every_object_says_whose_it_is(objects: list[dict[str, Any]]) -> None:
    for o in objects:
        labels = o["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "tita"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        if not o["kind"].startswith("Cluster"):
            assert o["metadata"]["namespace"] == "lab"


def test_there_is_a_cronjob_for_every_job_file(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    cronjobs = [o for o in objects if o["kind"] == "CronJob"]
    assert sorted(o["metadata"]["labels"]["tita.dev/job"] for o in cronjobs) == job_names()
    for name in job_names():
        spec = load_job(name)
        cronjob = chart.find(objects, "CronJob", f"tita-{name}")["spec"]
        job = cronjob["jobTemplate"]["spec"]
        assert job["activeDeadlineSeconds"] == spec.deadline_seconds
        assert job["backoffLimit"] == spec.backoff_limit
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


def test_selectors_hold_nothing_that_an_upgrade_changes(objects: list[dict[str, Any]]) -> None:
    for o in objects:
        if o["kind"] in ("Deployment", "StatefulSet"):
            keys = o["spec"]["selector"]["matchLabels"].keys()
            assert {k.removeprefix("app.kubernetes.io/") for k in keys} == {
                "name", "instance", "component",
            }  # fmt: skip
            assert "volumeClaimTemplates" not in o["spec"]


def test_services_and_probes_point_at_real_ports(
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
                action = container[probe].get("httpGet") or container[probe]["tcpSocket"]
                assert action["port"] in ports, f"{where} {probe}"


def test_routes_lead_to_services(chart: SimpleNamespace) -> None:
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


def test_volumes_are_there_and_used(chart: SimpleNamespace, objects: list[dict[str, Any]]) -> None:
    claims = {o["metadata"]["name"] for o in objects if o["kind"] == "PersistentVolumeClaim"}
    for where, pod in chart.pod_templates(objects):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounted = {m["name"] for c in pod["spec"]["containers"] for m in c["volumeMounts"]}
        assert mounted == set(volumes), where
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in claims | {"models"}, where


def test_pods_fit_pod_security_restricted(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "secret"}
    for where, pod in chart.pod_templates(objects):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), where
        assert spec["automountServiceAccountToken"] is False, where
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= allowed, where
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            assert not any("hostPort" in port for port in container.get("ports", []))


def test_containers_say_what_they_need(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    for where, container in chart.containers(objects):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys(), where
        assert "memory" in resources["limits"], where
        for amounts in resources.values():
            assert all(QUANTITY.match(str(amount)) for amount in amounts.values()), where


def test_the_chart_runs_the_packages_version(chart: SimpleNamespace) -> None:
    about = yaml.safe_load((chart.path / "Chart.yaml").read_text())
    assert about["appVersion"] == tita.__version__
    for where, container in chart.containers(chart.render()):
        assert container["image"] == f"tita:{tita.__version__}", where


def test_pod_and_image_agree_about_the_user(chart: SimpleNamespace) -> None:
    dockerfile = (chart.root / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.MULTILINE)
    for _, pod in chart.pod_templates(chart.render()):
        assert pod["spec"]["securityContext"]["runAsUser"] == int(user)


def test_images_are_pinned(chart: SimpleNamespace, objects: list[dict[str, Any]]) -> None:
    for where, container in chart.containers(objects):
        assert re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]), where


def test_settings_know_every_name_in_the_environment(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    known = {f"TITA_{field.upper()}" for field in Settings.model_fields}
    for where, container in chart.containers(objects):
        names = [entry["name"] for entry in container.get("env", [])]
        assert len(names) == len(set(names)), where
        assert {name for name in names if name.startswith("TITA_")} <= known, where


def test_settings_take_the_jobs_environment(
    chart: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cronjob = chart.find(chart.render(files=("full",)), "CronJob", "tita-train-dpo")
    (container,) = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    in_pod = {"TITA_RUN": "my-run", "TITA_NODE_RANK": "1"}
    for name, value in chart.environment(container).items():
        if name.startswith("TITA_"):
            text = value if isinstance(value, str) else in_pod[name]
            monkeypatch.setenv(name, re.sub(r"\$\((\w+)\)", lambda m: in_pod[m[1]], text))
    found = Settings()
    assert found.store == "s3://my-bucket/tita"
    assert found.s3_endpoint_url == "https://s3.example"
    assert found.s3_path_style
    assert (found.num_nodes, found.node_rank, found.procs_per_node) == (2, 1, 8)
    assert (found.master_addr, found.master_port) == ("my-run-0.tita-jobs", 29500)
    assert found.recipe == '{"beta":0.2}'


def test_pods_call_commands_and_options_that_there_are(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    from typer.main import get_command

    from tita.cli.commands import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for where, container in chart.containers(objects):
        if container["name"] == "tita":
            command, *options = container["args"]
            known = {name for param in commands[command].params for name in param.opts}
            assert {option.partition("=")[0] for option in options} <= known, where


def test_variables_are_defined_before_they_are_used(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    for where, container in chart.containers(objects):
        seen: set[str] = set()
        for entry in container.get("env", []):
            assert set(re.findall(r"\$\((\w+)\)", entry.get("value", ""))) <= seen, where
            seen.add(entry["name"])


def test_failure_policy_and_exit_codes_agree(
    chart: SimpleNamespace, objects: list[dict[str, Any]]
) -> None:
    never = {ExitCode.USER, ExitCode.OUT_OF_MEMORY}
    uncounted = {ExitCode.RETRY, ExitCode.LOST_PEER, ExitCode.TERMINATED}
    for cronjob in (o for o in objects if o["kind"] == "CronJob"):
        job = cronjob["spec"]["jobTemplate"]["spec"]
        disruption, fail, ignore = job["podFailurePolicy"]["rules"]
        assert disruption["action"] == "Ignore"
        assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert fail["action"] == "FailJob"
        assert set(fail["onExitCodes"]["values"]) == never
        assert ignore["action"] == "Ignore"
        assert set(ignore["onExitCodes"]["values"]) == uncounted
        for rule in (fail, ignore):
            assert rule["onExitCodes"]["operator"] == "In"
            assert rule["onExitCodes"]["containerName"] == "tita"
        # What the API refuses beside a podFailurePolicy.
        assert job["podReplacementPolicy"] == "Failed"
        assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_exit_codes_say_in_words_what_the_policy_does() -> None:
    source = (Path(__file__).parents[2] / "tita" / "errors.py").read_text()
    words = dict(re.findall(r'    (\w+) = \d+\n    """([^"]+)"""', source))
    assert {code for code, said in words.items() if "Never retried" in said} == {
        "USER", "OUT_OF_MEMORY",
    }  # fmt: skip
    assert {code for code, said in words.items() if "not counted" in said} == {
        "RETRY", "LOST_PEER", "TERMINATED",
    }  # fmt: skip


def test_success_is_rank_0s_where_kubernetes_knows_how(chart: SimpleNamespace) -> None:
    for kube, known in (("1.28", False), ("1.30", False), ("1.31", True), ("1.36", True)):
        for cronjob in (o for o in chart.render(kube=kube) if o["kind"] == "CronJob"):
            job = cronjob["spec"]["jobTemplate"]["spec"]
            assert job["completionMode"] == "Indexed"
            assert ("successPolicy" in job) is known


def test_workers_find_each_other(chart: SimpleNamespace, objects: list[dict[str, Any]]) -> None:
    service = chart.find(objects, "Service", "tita-jobs")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    for where, pod in chart.pod_templates(objects):
        if where.startswith("CronJob/"):
            assert pod["spec"]["subdomain"] == "tita-jobs"
            assert service["selector"].items() <= pod["metadata"]["labels"].items()


def test_the_time_to_save_is_torchruns_too(chart: SimpleNamespace) -> None:
    for where, pod in chart.pod_templates(chart.render()):
        if where.startswith("CronJob/"):
            env = chart.environment(pod["spec"]["containers"][0])
            patience = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
            assert 30 < patience < pod["spec"]["terminationGracePeriodSeconds"]


def test_no_secret_stands_in_the_open(chart: SimpleNamespace) -> None:
    for files in FILES:
        for where, container in chart.containers(chart.render(files=(files,))):
            for name, value in chart.environment(container).items():
                if re.search(r"SECRET|TOKEN|API_KEYS|ACCESS_KEY", name):
                    assert "secretKeyRef" in value, f"{where} {name}"
    kinds = [o["kind"] for files in ("default", "full") for o in chart.render(files=(files,))]
    assert "Secret" not in kinds


def test_the_role_has_just_the_launchers_verbs(chart: SimpleNamespace) -> None:
    role = chart.find(chart.render(files=("full",)), "Role", "tita-launcher")
    granted = {
        (resource, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not any("*" in pair for pair in granted)
    writes = {pair for pair in granted if pair[1] not in ("get", "list", "watch")}
    assert writes == {
        ("jobs", "create"), ("jobs", "delete"), ("jobs", "patch"), ("deployments", "patch"),
    }  # fmt: skip
    assert not any(resource == "secrets" for resource, _ in granted)


def test_default_values_make_nothing_cluster_wide_and_no_custom_resource(
    chart: SimpleNamespace,
) -> None:
    kinds = {o["kind"] for o in chart.render()}
    assert kinds == {"CronJob", "Pod", "Role", "Service", "ServiceAccount"}


def test_rendering_takes_under_a_second(chart: SimpleNamespace) -> None:
    def once() -> float:
        begin = time.perf_counter()
        assert chart.template(files=("full",)).returncode == 0
        return time.perf_counter() - begin

    assert min(once() for _ in range(3)) < 1


def test_kubectl_reads_every_template(chart: SimpleNamespace, tmp_path: Path) -> None:
    """`kubectl create job --from` needs a cluster; the part before it reads the CronJob here."""
    helm_dir = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir()
    file = tmp_path / "cronjob.yaml"
    file.write_text(yaml.safe_dump(chart.find(chart.render(), "CronJob", "tita-train-dpo")))
    done = subprocess.run(
        [helm_dir / "kubectl", "label", "--local", "-f", file, "a=b", "-o", "name"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "cronjob.batch/tita-train-dpo", done.stderr
