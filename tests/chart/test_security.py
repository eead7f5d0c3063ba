"""Pod security, secrets and RBAC."""

import re
from types import SimpleNamespace
from typing import Any

import yaml

from tita.launch import preflight
from tita.launch.component_health import COMPONENTS

FILES = ("default", "full", "trial")


def test_pods_comply_with_pod_security_restricted(
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


def test_pod_and_image_use_the_same_user(chart: SimpleNamespace) -> None:
    dockerfile = (chart.root / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.MULTILINE)
    for _, pod in chart.pod_templates(chart.render()):
        assert pod["spec"]["securityContext"]["runAsUser"] == int(user)


def test_images_are_pinned(chart: SimpleNamespace, objects: list[dict[str, Any]]) -> None:
    for where, container in chart.containers(objects):
        assert re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]), where


def test_credentials_come_from_secrets(chart: SimpleNamespace) -> None:
    for files in FILES:
        for where, container in chart.containers(chart.render(files=(files,))):
            for name, value in chart.environment(container).items():
                if re.search(r"SECRET|TOKEN|API_KEYS|ACCESS_KEY", name):
                    assert "secretKeyRef" in value, f"{where} {name}"
    kinds = [o["kind"] for files in ("default", "full") for o in chart.render(files=(files,))]
    assert "Secret" not in kinds


def test_the_role_has_only_the_launchers_verbs(chart: SimpleNamespace) -> None:
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
    (patch,) = [rule for rule in role["rules"] if rule["resources"] == ["deployments"]
                and "patch" in rule["verbs"]]  # fmt: skip
    assert patch["resourceNames"] == ["tita-inference"], "not every Deployment of the namespace"


def test_the_role_names_the_workloads_that_doctor_reads(chart: SimpleNamespace) -> None:
    objects = chart.render(files=("trial",))
    role = chart.find(objects, "Role", "tita-launcher")
    annotations = chart.find(objects, "CronJob", "tita-train-dpo")["metadata"]["annotations"]
    for component in COMPONENTS:
        name = annotations[component.annotation]
        chart.find(objects, component.kind, name)
        plural, _, group = component.resource.partition(".")
        assert any(
            rule["apiGroups"] == [group]
            and rule["resources"] == [plural]
            and rule.get("resourceNames") == [name]
            and "get" in rule["verbs"]
            for rule in role["rules"]
        )
    bare = chart.find(chart.render(), "CronJob", "tita-train-dpo")["metadata"]["annotations"]
    assert not {component.annotation for component in COMPONENTS} & set(bare)
    verbs = chart.find(chart.render(), "Role", "tita-launcher")["rules"]
    assert "patch" not in str([rule for rule in verbs if "deployments" in rule["resources"]])


def test_cluster_roles_of_two_releases_have_different_names(chart: SimpleNamespace) -> None:
    def names(release: str, namespace: str) -> set[str]:
        done = chart.run_helm(
            "template", release, str(chart.path), "--namespace", namespace,
            "--set=s3.bucket=my-bucket,rbac.clusterRole=true",
        )  # fmt: skip
        objects = [o for o in yaml.safe_load_all(done.stdout) if o]
        return {o["metadata"]["name"] for o in objects if o["kind"] == "ClusterRole"}

    assert names("prod", "ml") != names("tita", "ml-prod")


def test_the_role_has_every_permission_that_preflight_checks(chart: SimpleNamespace) -> None:
    role = chart.find(chart.render(files=("full",)), "Role", "tita-launcher")
    granted = {
        (verb, f"{resource}.{group}".rstrip("."))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(preflight.PERMISSIONS) <= granted


def test_default_values_render_no_cluster_wide_or_custom_resource(
    chart: SimpleNamespace,
) -> None:
    kinds = {o["kind"] for o in chart.render()}
    assert kinds == {"CronJob", "Pod", "Role", "Service", "ServiceAccount"}
