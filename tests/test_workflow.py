"""The workflow: pinned actions, least permissions, no secret in a command, targets that exist."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, Any] = WORKFLOW["jobs"]
WRITES = {"docs": {"pages", "id-token"}, "publish": {"packages"}}
"""What a job may write."""


def commands(job: str) -> str:
    return "\n".join(step.get("run", "") for step in JOBS[job]["steps"])


def test_actions_are_pinned_by_hash() -> None:
    used = re.findall(r"uses: (.+)", TEXT)
    assert len(used) > 8
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


def test_permissions_are_least() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name, job in JOBS.items():
        granted = job.get("permissions", {})
        writes = {scope for scope, access in granted.items() if access == "write"}
        assert writes == WRITES.get(name, set()), name
        assert job["timeout-minutes"] <= 120
    # YAML 1.1 reads the key `on` as true.
    assert set(WORKFLOW[True]) == {"push", "pull_request", "schedule"}


def test_commands_have_no_expressions() -> None:
    """A secret would be in the log's command, and a branch's name would be run."""
    for name in JOBS:
        assert "${{" not in commands(name), name


def test_every_supported_python_is_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert JOBS["check"]["strategy"]["matrix"]["python-version"] == versions


def test_what_is_published_was_checked_and_has_sbom_and_provenance() -> None:
    assert set(JOBS["publish"]["needs"]) >= {"check", "vllm"}
    assert "--sbom=true --provenance=mode=max" in commands("publish")
    assert "make chart-package CHART_KEYRING=" in commands("publish")


def test_targets_exist() -> None:
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "charts" / "chart.mk").read_text()
    everything = "\n".join([*map(commands, JOBS), (ROOT / ".ci" / "run").read_text()])
    targets = {
        word
        for line in re.findall(r"^ *make ([a-z].*)", everything, re.MULTILINE)
        for word in line.split()
        if re.fullmatch(r"[a-z-]+", word)
    }
    assert {"audit", "docs", "test", "demo", "pictures"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefiles, re.MULTILINE), target
