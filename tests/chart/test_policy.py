"""checkov finds nothing in chart and Dockerfile but what `policy_exceptions.yaml` argues."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

VERSION = "3.3.30"
WRONG = "wrong.yaml"
# Digests are the user's to give; with them checkov is content about images.
DIGESTS = dict.fromkeys(("image.digest", "s3.embedded.image.digest"), f"sha256:{'0' * 64}")
EXCEPTIONS = yaml.safe_load((Path(__file__).parent / "policy_exceptions.yaml").read_text())


@pytest.fixture(scope="session")
def checkov(chart: SimpleNamespace) -> Path:
    """checkov in an environment of its own: it pins far too much to share ours."""
    folder: Path = chart.root / ".cache" / f"checkov-{VERSION}"
    program = folder / "bin" / "checkov"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "pip", "install", "--quiet", f"checkov=={VERSION}"]
        subprocess.run(pip, check=True, timeout=1200)
        (folder / "complete").touch()
    return program


@pytest.fixture(scope="session")
def scanned(
    chart: SimpleNamespace, checkov: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What checkov finds in the chart, in the Dockerfile, and in a pod that is wrong."""
    folder = tmp_path_factory.mktemp("policy")
    for files in ("full", "trial"):
        rendered = chart.template(DIGESTS, files=(files,), release=files)
        (folder / f"{files}.yaml").write_text(rendered.stdout)
    (folder / "Dockerfile").write_text((chart.root / "Dockerfile").read_text())
    pod = next(o for o in chart.render() if o["kind"] == "Pod")
    pod["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    (folder / WRONG).write_text(yaml.safe_dump(pod))
    done = subprocess.run(
        [checkov, "--framework", "kubernetes", "dockerfile", "--directory", folder,
         "--output", "json", "--skip-download", "--quiet"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    reports = {report["check_type"]: report for report in json.loads(done.stdout)}
    assert reports["kubernetes"]["summary"]["passed"] > 600
    assert reports["dockerfile"]["summary"]["passed"] > 100
    return [f for report in reports.values() for f in report["results"]["failed_checks"]]


@pytest.fixture(scope="session")
def findings(scanned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [finding for finding in scanned if finding["file_path"] != f"/{WRONG}"]


def excuses(exception: dict[str, str], finding: dict[str, Any]) -> bool:
    return finding["check_id"] == exception["check"] and bool(
        re.search(exception["resource"], finding["resource"])
    )


def test_no_finding_without_a_reason(findings: list[dict[str, Any]]) -> None:
    unexcused = [
        f"{f['check_id']} {f['resource']}: {f['check_name']}"
        for f in findings
        if not any(excuses(exception, f) for exception in EXCEPTIONS)
    ]
    assert not unexcused, "\n".join(unexcused)


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda e: e["check"])
def test_no_reason_without_a_finding(
    findings: list[dict[str, Any]], exception: dict[str, str]
) -> None:
    assert any(excuses(exception, f) for f in findings)
    assert len(exception["reason"]) > 40


def test_the_scan_sees_what_is_wrong(scanned: list[dict[str, Any]]) -> None:
    """A privileged container must be found, or an empty list of findings says nothing."""
    wrong = {f["check_id"] for f in scanned if f["file_path"] == f"/{WRONG}"}
    assert "CKV_K8S_16" in wrong
