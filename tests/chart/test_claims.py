"""The claim of the embedded store outlives upgrades, renames and the release."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.chart.api.server import ApiServer

Command = Callable[..., str]
PLURAL = "persistentvolumeclaims"

pytestmark = pytest.mark.parametrize("tools", ["3", "4"], indirect=True)


def claims(api: ApiServer) -> dict[str, Any]:
    """Map the names of claims to their uids."""
    return {
        name: o["metadata"]["uid"] for (plural, name), o in api.objects.items() if plural == PLURAL
    }


def mounted(api: ApiServer) -> str | None:
    """The claim that the pod of the embedded store mounts."""
    (found,) = [o for (plural, _), o in api.objects.items() if plural == "statefulsets"]
    volumes = {v["name"]: v for v in found["spec"]["template"]["spec"]["volumes"]}
    claim: str | None = volumes["data"].get("persistentVolumeClaim", {}).get("claimName")
    return claim


def put_claim(api: ApiServer, name: str, *, owner: str = "", **metadata: Any) -> None:
    labels = {"app.kubernetes.io/instance": "tita", "app.kubernetes.io/component": "s3"}
    if owner:
        labels["app.kubernetes.io/managed-by"] = "Helm"
        metadata["annotations"] = {
            "meta.helm.sh/release-name": owner, "meta.helm.sh/release-namespace": "lab",
        }  # fmt: skip
    claim = {"metadata": {"name": name, "labels": labels, **metadata}, "spec": {}}
    api.put(PLURAL, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim})


@pytest.mark.parametrize("renamed", ["nameOverride=vlm", "fullnameOverride=vlm"])
def test_a_renamed_release_keeps_its_claim(api: ApiServer, deploy: Command, renamed: str) -> None:
    deploy("install", "trial")
    before = claims(api)
    assert mounted(api) == "tita-s3"
    for size in ("50Gi", "90Gi"):
        deploy("upgrade", "trial", f"--set={renamed},s3.embedded.persistence.size={size}")
        assert claims(api) == before
        assert mounted(api) == "tita-s3"
    requests = api.objects[PLURAL, "tita-s3"]["spec"]["resources"]["requests"]
    assert requests["storage"] == "90Gi"
    deploy("upgrade", "trial", "--set=nameOverride=,fullnameOverride=")
    assert (claims(api), mounted(api)) == (before, "tita-s3")


@pytest.mark.parametrize(
    "without", ["s3.embedded.persistence.enabled=false", "s3.embedded.enabled=false,s3.bucket=real"]
)
def test_a_claim_that_is_not_used_any_more_is_kept(
    api: ApiServer, deploy: Command, without: str
) -> None:
    deploy("install", "trial")
    before = claims(api)
    notes = deploy("upgrade", "trial", f"--set={without}")
    assert claims(api) == before
    if "persistence" in without:
        assert mounted(api) is None
        assert "claim tita-s3" in notes
    deploy("upgrade", "trial")
    assert (claims(api), mounted(api)) == (before, "tita-s3")


def test_an_install_right_after_an_uninstall_uses_the_claim(
    api: ApiServer, run: Command, deploy: Command
) -> None:
    deploy("install", "trial")
    before = claims(api)
    assert "[PersistentVolumeClaim] tita-s3" in run("helm", "uninstall", "tita")
    notes = deploy("install", "trial")
    assert (claims(api), mounted(api)) == (before, "tita-s3")
    assert "claim tita-s3" in notes
    assert "helm uninstall" in notes


def test_a_claim_of_another_name_can_be_given(api: ApiServer, deploy: Command) -> None:
    put_claim(api, "mine")
    before = claims(api)
    deploy("install", "trial", "--set=s3.embedded.persistence.existingClaim=mine")
    assert (claims(api), mounted(api)) == (before, "mine")


def test_a_claim_that_was_created_by_hand_is_used_as_it_is(api: ApiServer, deploy: Command) -> None:
    put_claim(api, "tita-s3")
    before = dict(api.objects[PLURAL, "tita-s3"])
    deploy("install", "trial")
    assert mounted(api) == "tita-s3"
    assert api.objects[PLURAL, "tita-s3"] == before


def test_a_claim_that_is_being_deleted_is_refused(api: ApiServer, deploy: Command) -> None:
    put_claim(api, "tita-s3", owner="tita", deletionTimestamp="2026-01-01T00:00:00Z")
    with pytest.raises(AssertionError, match="claim tita-s3 is being deleted") as failure:
        deploy("install", "trial")
    assert "existingClaim" in str(failure.value)
    put_claim(api, "tita-inference-cache", deletionTimestamp="2026-01-01T00:00:00Z")
    del api.objects[PLURAL, "tita-s3"]
    with pytest.raises(AssertionError, match="claim tita-inference-cache is being deleted"):
        deploy("install", "trial", "--set=inference.cache.persistence.enabled=true")


def test_a_claim_of_another_release_is_refused(api: ApiServer, deploy: Command) -> None:
    put_claim(api, "tita-s3", owner="other")
    with pytest.raises(AssertionError, match="claim tita-s3 belongs to release other"):
        deploy("install", "trial")
    deploy("install", "trial", "--set=s3.embedded.persistence.existingClaim=tita-s3")
    assert mounted(api) == "tita-s3"


def test_one_of_several_claims_must_be_chosen(api: ApiServer, deploy: Command) -> None:
    for name in ("old-s3", "older-s3"):
        put_claim(api, name, owner="tita")
    with pytest.raises(AssertionError, match="existingClaim to one of old-s3, older-s3"):
        deploy("install", "trial")
