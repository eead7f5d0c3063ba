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


def scan(checkov: Path, folder: Path) -> dict[str, tuple[int, list[dict[str, Any]]]]:
    """By framework, how many checks passed and the findings."""
    done = subprocess.run(
        [checkov, "--framework", "kubernetes", "dockerfile", "--directory", folder,
         "--output", "json", "--skip-download", "--quiet"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    reports = json.loads(done.stdout)
    return {
        report["check_type"]: (report["summary"]["passed"], report["results"]["failed_checks"])
        for report in (reports if isinstance(reports, list) else [reports])
    }


@pytest.fixture(scope="session")
def findings(
    chart: SimpleNamespace, checkov: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("policy")
    for files in ("full", "trial"):
        rendered = chart.template(DIGESTS, files=(files,), release=files)
        (folder / f"{files}.yaml").write_text(rendered.stdout)
    (folder / "Dockerfile").write_text((chart.root / "Dockerfile").read_text())
    reports = scan(checkov, folder)
    assert reports["kubernetes"][0] > 600
    assert reports["dockerfile"][0] > 100
    return reports["kubernetes"][1] + reports["dockerfile"][1]


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


def test_the_scan_sees_what_is_wrong(chart: SimpleNamespace, checkov: Path, tmp_path: Path) -> None:
    """A privileged container must be found, or an empty list of findings says nothing."""
    pod = next(o for o in chart.render() if o["kind"] == "Pod")
    pod["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump(pod))
    _, failed = scan(checkov, tmp_path)["kubernetes"]
    assert "CKV_K8S_16" in {finding["check_id"] for finding in failed}
