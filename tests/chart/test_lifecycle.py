"""helm install, upgrade, rollback and uninstall against an in-memory API server."""

import json
import shlex
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
from typer.main import get_command

from tests.chart.api.server import ApiServer
from tita.cli.commands import app
from tita.launch.template import JobShape, JobTemplate, make_job

Objects = dict[tuple[str, str], dict[str, Any]]
Command = Callable[..., str]
CHANGES = {
    "image.tag": "2.0.0",
    "jobs.resources.requests.memory": "32Gi",
    "jobs.perJob.train-dpo.gpusPerNode": 8,
    "inference.resources.requests.memory": "24Gi",
    "inference.weight": 0.5,
}


def without_release_secrets(objects: Objects) -> Objects:
    """Copy the objects without helm's release records."""
    kept = {key: o for key, o in objects.items() if not key[1].startswith("sh.helm.")}
    copied: Objects = {key: json.loads(json.dumps(o)) for key, o in kept.items()}
    return copied


def uids(objects: Objects) -> dict[tuple[str, str], str]:
    return {key: o["metadata"]["uid"] for key, o in without_release_secrets(objects).items()}


def content(objects: Objects) -> dict[tuple[str, str], Any]:
    """Map the objects to their content without metadata and status."""
    return {
        key: {k: v for k, v in o.items() if k not in ("metadata", "status")}
        for key, o in without_release_secrets(objects).items()
    }


def next_version(chart: SimpleNamespace, folder: Path) -> Path:
    """Copy the chart with another version, which appears in labels."""
    copy = folder / "tita"
    shutil.copytree(chart.path, copy)
    metadata = copy / "Chart.yaml"
    metadata.write_text(metadata.read_text().replace("version: 0.1.0", "version: 0.2.0"))
    return copy


@pytest.mark.parametrize("tools", ["3", "4"], indirect=True)
@pytest.mark.parametrize("files", ["default", "full", "trial"])
def test_install_upgrade_rollback_uninstall(
    chart: SimpleNamespace,
    api: ApiServer,
    run: Command,
    deploy: Command,
    tmp_path: Path,
    files: str,
) -> None:
    assert "Next:" in deploy("install", files)
    installed, first_uids = content(api.objects), uids(api.objects)
    names = {o["metadata"]["name"] for o in chart.render(files=(files,)) if o["kind"] != "Pod"}
    assert {name for _, name in installed} == names

    by_hand = json.loads(
        run("kubectl", "create", "job", "by-hand", "--from=cronjob/tita-train-dpo",
            "--dry-run=client", "--output=json")
    )  # fmt: skip
    kubernetes_validate.validate(by_hand, chart.newest, strict=True)
    template = JobTemplate(cron_job=api.objects["cronjobs", "tita-train-dpo"])
    shape = JobShape(nodes=1, gpus_per_node=1)
    made = make_job(template, run="my-run", launch_id="x", shape=shape, recipe={})
    api.put("jobs", made)
    assert "ownerReferences" not in made["metadata"], "uninstall would delete the run"
    api.requests.clear()

    flags = [f"--set-json={key}={json.dumps(value)}" for key, value in CHANGES.items()]
    deploy("upgrade", files, *flags, folder=next_version(chart, tmp_path))
    assert not [request for request in api.requests if request[0] == "DELETE"]
    assert api.objects["jobs", "my-run"] == made
    after = uids(api.objects)
    assert {key: uid for key, uid in after.items() if key[0] != "jobs"} == first_uids
    spec = api.objects["cronjobs", "tita-train-dpo"]["spec"]["jobTemplate"]["spec"]
    (worker,) = spec["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert worker["resources"]["requests"]["memory"] == "32Gi"
    if files != "full":  # full-values.yaml sets a digest
        assert worker["image"] == "tita:2.0.0"

    run("helm", "rollback", "tita", "1")
    assert not [r for r in api.requests if r[0] == "DELETE" and r[1] != "secrets"]
    assert uids(api.objects) == after
    back = content(api.objects)
    assert {key: o for key, o in back.items() if key[0] != "jobs"} == installed

    run("helm", "uninstall", "tita")
    kept = {("persistentvolumeclaims", "tita-s3")} if files == "trial" else set()
    assert set(api.objects) == {("jobs", "my-run")} | kept, "uninstall must keep launched runs"


def test_upgrades_keep_the_keys_of_the_embedded_store(api: ApiServer, deploy: Command) -> None:
    deploy("install", "trial")
    keys = dict(api.objects["secrets", "tita-s3"]["data"])
    assert len(keys["AWS_SECRET_ACCESS_KEY"]) > 40
    deploy("upgrade", "trial", "--set=image.pullPolicy=Always")
    assert api.objects["secrets", "tita-s3"]["data"] == keys


def test_a_deleted_secret_is_replaced_by_new_keys(
    api: ApiServer, run: Command, deploy: Command
) -> None:
    """How docs/operations.md rotates the keys of the embedded store."""
    deploy("install", "trial")
    keys = dict(api.objects.pop(("secrets", "tita-s3"))["data"])
    deploy("upgrade", "trial")
    new = api.objects["secrets", "tita-s3"]["data"]
    assert new.keys() == keys.keys()
    assert not set(new.values()) & set(keys.values())
    run("helm", "rollback", "tita", "1")
    assert api.objects["secrets", "tita-s3"]["data"] == keys, "a rollback restores the old keys"
    run("helm", "uninstall", "tita")
    deploy("install", "trial")
    again = api.objects["secrets", "tita-s3"]["data"]
    assert not set(again.values()) & set(keys.values())


def test_the_claim_of_the_embedded_store_can_be_resized(api: ApiServer, deploy: Command) -> None:
    deploy("install", "trial")
    deploy("upgrade", "trial", "--set=s3.embedded.persistence.size=90Gi")
    claim = api.objects["persistentvolumeclaims", "tita-s3"]["spec"]
    assert claim["resources"]["requests"]["storage"] == "90Gi"


def test_disabled_objects_are_deleted(api: ApiServer, deploy: Command) -> None:
    deploy("install", "full")
    assert ("deployments", "tita-inference") in api.objects
    deploy("upgrade", "default")
    left = {key for key in without_release_secrets(api.objects) if "inference" in key[1]}
    assert left == set()


@pytest.mark.parametrize("tools", ["3", "4"], indirect=True)
def test_enabling_the_autoscaler_keeps_the_running_replicas(
    api: ApiServer, deploy: Command
) -> None:
    def running() -> Any:
        return api.objects["deployments", "tita-inference"]["spec"].get("replicas", "reset to 1")

    deploy("install", "trial", "--set=inference.replicaCount=2")
    scaling = "--set=inference.autoscaling.enabled=true"
    deploy("upgrade", "trial", scaling)
    assert running() == 2
    api.objects["deployments", "tita-inference"]["spec"]["replicas"] = 3  # by the autoscaler
    deploy("upgrade", "trial", scaling, "--set=image.pullPolicy=Always")
    assert running() == 3
    deploy("upgrade", "trial", scaling, "--set=inference.autoscaling.maxReplicas=2")
    assert running() == 2


@pytest.mark.parametrize("tools", ["3", "4"], indirect=True)
def test_keda_takes_over_from_the_hpa_when_that_is_deleted(api: ApiServer, deploy: Command) -> None:
    """KEDA's webhook refuses a Deployment with an HPA (github.com/kedacore/keda/issues/4066)."""
    hpa, scaled = (
        (kind, "tita-inference") for kind in ("horizontalpodautoscalers", "scaledobjects")
    )
    flags = ("--set=inference.autoscaling.enabled=true", "--set=inference.replicaCount=1")
    deploy("install", "trial", *flags)
    api.objects["deployments", "tita-inference"]["spec"]["replicas"] = 3  # by the autoscaler
    keda = (*flags, "--set=inference.autoscaling.kind=keda")
    with pytest.raises(AssertionError, match="delete that first: `kubectl delete hpa tita-inferen"):
        deploy("upgrade", "trial", *keda)
    assert hpa in api.objects
    del api.objects[hpa]
    deploy("upgrade", "trial", *keda)
    deploy("upgrade", "trial", *keda, "--set=logLevel=debug")
    assert (hpa in api.objects, scaled in api.objects) == (False, True)
    assert api.objects["deployments", "tita-inference"]["spec"]["replicas"] == 3
    deploy("upgrade", "trial", *flags)
    assert (hpa in api.objects, scaled in api.objects) == (True, False)


def test_two_releases_share_a_namespace(
    api: ApiServer, run: Command, chart: SimpleNamespace
) -> None:
    for release in ("tita", "other"):
        run(
            "helm", "install", release, str(chart.path), "--disable-openapi-validation",
            f"--values={chart.path / 'ci' / 'full'}-values.yaml",
        )  # fmt: skip
    run("helm", "uninstall", "other")
    assert ("deployments", "tita-inference") in api.objects
    assert not [key for key in api.objects if "other" in key[1]]


def test_the_api_server_rejects_changes_of_immutable_fields(run: Command, deploy: Command) -> None:
    """The tests above depend on this."""
    deploy("install", "trial")
    selector = {"spec": {"selector": {"matchLabels": {"app.kubernetes.io/name": "vision"}}}}
    with pytest.raises(AssertionError, match="immutable"):
        run("kubectl", "patch", "deployment", "tita-inference", f"--patch={json.dumps(selector)}")


CACHE = "inference.cache.persistence"


@pytest.mark.parametrize("tools", ["3", "4"], indirect=True)
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("inference.enabled=true", "nameOverride=vision,fullnameOverride=tita",
         r"nameOverride: (Deployment|StatefulSet) tita-\S+ selects pods by \S+=tita.*; set nameO"),
        ("inference.enabled=false", "nameOverride=vision,fullnameOverride=tita",
         r"nameOverride: StatefulSet tita-s3 selects"),
        (f"{CACHE}.enabled=true", f"{CACHE}.accessModes={{ReadWriteMany}}",
         r"accessModes: claim tita-inference-cache has ReadWriteOnce, which.*; restore the value"),
        (f"{CACHE}.enabled=true,{CACHE}.storageClass=old", f"{CACHE}.storageClass=new",
         r"storageClass: claim tita-inference-cache has the storage class old.*; restore the"),
        ("s3.embedded.persistence.storageClass=old", "s3.embedded.persistence.storageClass=new",
         r"s3.embedded.persistence.storageClass: claim tita-s3 has the storage class old"),
    ],
)  # fmt: skip
def test_an_upgrade_that_changes_an_immutable_field_changes_nothing(
    api: ApiServer, deploy: Command, before: str, after: str, message: str
) -> None:
    """The API server would refuse it in the middle of the upgrade."""
    deploy("install", "trial", f"--set={before}")
    deploy("upgrade", "trial", f"--set={before},image.pullPolicy=Always")
    installed = content(api.objects)
    with pytest.raises(AssertionError, match=message):
        deploy("upgrade", "trial", f"--set={before},logLevel=debug", f"--set={after}")
    assert content(api.objects) == installed


def test_the_modes_of_the_model_cache_are_changed_by_a_new_claim(
    api: ApiServer, deploy: Command
) -> None:
    deploy("install", "trial", f"--set={CACHE}.enabled=true")
    many = f"--set={CACHE}.accessModes={{ReadWriteMany}}"
    deploy("upgrade", "trial", f"--set={CACHE}.enabled=false", many)
    deploy("upgrade", "trial", f"--set={CACHE}.enabled=true", many)
    claim = api.objects["persistentvolumeclaims", "tita-inference-cache"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(
    ("files", "flags", "expected"),
    [
        ("default", [], ["tita launch train-dpo", "inference.enabled=true"]),
        ("default", ["--set=s3.existingSecret=keys"], ["create secret generic keys"]),
        ("trial", [], ["for trials only", "port-forward svc/tita-s3", "without a key"]),
        ("full", [], ["port-forward svc/tita-inference", "s3://my-bucket/tita."]),
    ],
)
def test_the_notes_list_the_next_commands(
    chart: SimpleNamespace, deploy: Command, files: str, flags: list[str], expected: list[str]
) -> None:
    notes = deploy("install", files, *flags)
    after = notes.split("Next:\n\n", 1)[1].split("\n\n", 1)[0]
    assert len(after.strip().splitlines()) == 3
    for words in expected:
        assert words in notes
    lines = [shlex.split(line) for line in notes.splitlines() if line.startswith("  ")]
    assert {program for program, *_ in lines} == {"helm", "kubectl", "tita"} - (
        {"kubectl"} if files == "default" and not flags else set()
    )
    for program, command, *arguments in lines:
        options = dict(pairwise([command, *arguments]))
        if (program, command) in (("tita", "ask"), ("tita", "data")):
            assert options.get("--store", "s3://my-bucket") == "s3://my-bucket"
        else:
            assert options.get("--namespace", options.get("-n")) == "lab", "acts on this release"
        if program == "tita":
            if "--image" in arguments:
                arguments[arguments.index("--image") + 1] = __file__  # an existing file
            found: Any = get_command(app).commands[command]  # type: ignore[attr-defined]
            while hasattr(found, "commands"):
                found = found.commands[arguments.pop(0)]
            found.make_context(command, arguments)  # raises if it cannot be parsed
        elif command == "upgrade":
            assert arguments[:2] == ["tita", "charts/tita"]
            settings = ["--set=s3.bucket=my-bucket"]
            settings += [f"--set={b}" for a, b in pairwise(arguments) if a == "--set"]
            done = chart.run_helm("template", "tita", str(chart.path), *settings)
            assert done.returncode == 0, done.stderr


def test_the_notes_list_values_without_effect(deploy: Command) -> None:
    """They are not refused: inference can be turned off for a while."""
    heading = "These values have no effect"
    off = {"inference": False, "networkPolicy": False}
    flags = [f"--set={part}.enabled={str(value).lower()}" for part, value in off.items()]
    assert heading not in deploy("install", "full")
    notes = deploy("upgrade", "full", *flags, "--set=rbac.create=false,serviceAccount.create=false")
    listed = [line for line in notes.splitlines() if line.startswith("- ")]
    assert listed == [
        *(f"- {part}.enabled, because inference.enabled is false"
          for part in ("inference.autoscaling", "inference.httpRoute", "inference.ingress",
                       "metrics.dashboard", "metrics.serviceMonitor")),
        "- networkPolicy.inferenceFrom, because networkPolicy.enabled is false",
        "- networkPolicy.metricsFrom, because networkPolicy.enabled is false",
        "- rbac.clusterRole, because rbac.create is false",
        "- rbac.subjects, because rbac.create is false",
        "- serviceAccount.annotations, because serviceAccount.create is false",
    ]  # fmt: skip
    assert heading in notes


def test_the_notes_do_not_mention_an_existing_secret(api: ApiServer, deploy: Command) -> None:
    api.put("secrets", {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "keys"}})
    assert "create secret" not in deploy("install", "default", "--set=s3.existingSecret=keys")
