"""checkov reports only the exceptions of `policy_exceptions.yaml` for chart and Dockerfile."""

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
CONSTRAINTS = Path(__file__).parent / "checkov_constraints.txt"
WRONG = "wrong.yaml"
# checkov requires digests, which users set.
DIGESTS = dict.fromkeys(("image.digest", "s3.embedded.image.digest"), f"sha256:{'0' * 64}")
EXCEPTIONS = yaml.safe_load((Path(__file__).parent / "policy_exceptions.yaml").read_text())


@pytest.fixture(scope="session")
def checkov(chart: SimpleNamespace) -> Path:
    """checkov in its own virtual environment, because it pins many dependencies.

    Without the constraints pip tries many versions, for a minute; they are `pip freeze` of one.
    """
    folder: Path = chart.root / ".cache" / f"checkov-{VERSION}"
    program = folder / "bin" / "checkov"
    if not (folder / "complete").exists():
        venv = [sys.executable, "-m", "venv", "--clear", "--without-pip", folder]
        subprocess.run(venv, check=True)
        pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
        pip += ["--quiet", "--no-compile", "-c", CONSTRAINTS, f"checkov=={VERSION}"]
        subprocess.run(pip, check=True, timeout=1200)
        (folder / "complete").touch()
    return program


@pytest.fixture(scope="session")
def scanned(
    chart: SimpleNamespace, checkov: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Findings for the chart, the Dockerfile, and a pod that violates a policy."""
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


def covers(exception: dict[str, str], finding: dict[str, Any]) -> bool:
    return finding["check_id"] == exception["check"] and bool(
        re.search(exception["resource"], finding["resource"])
    )


def test_every_finding_has_an_exception(findings: list[dict[str, Any]]) -> None:
    unexpected = [
        f"{f['check_id']} {f['resource']}: {f['check_name']}"
        for f in findings
        if not any(covers(exception, f) for exception in EXCEPTIONS)
    ]
    assert not unexpected, "\n".join(unexpected)


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda e: e["check"])
def test_every_exception_has_a_finding(
    findings: list[dict[str, Any]], exception: dict[str, str]
) -> None:
    assert any(covers(exception, f) for f in findings)
    assert len(exception["reason"]) > 40


def test_the_scan_finds_a_violation(scanned: list[dict[str, Any]]) -> None:
    """A privileged container is reported, so an empty list of findings is meaningful."""
    wrong = {f["check_id"] for f in scanned if f["file_path"] == f"/{WRONG}"}
    assert "CKV_K8S_16" in wrong
