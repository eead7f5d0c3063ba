"""Runs helm, parses the objects that it renders, and serves an API for it to install them."""

import importlib.util
import json
import pickle
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.chart.api.server import ApiServer

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "tita"
HELMS = ("3", "4")
OLDEST, NEWEST = "1.28", "1.36"

Objects = list[dict[str, Any]]
Command = Callable[..., str]


def load_script(path: Path) -> ModuleType:
    """Import a script of `charts/` as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def helm_binary(major: str) -> Path:
    folder: Path = load_script(ROOT / "charts" / "get_helm.py").helm_dir(major)
    return folder / "helm"


def run_helm(*arguments: str, major: str = "4") -> subprocess.CompletedProcess[str]:
    """Run helm without access to a cluster."""
    return subprocess.run(
        [helm_binary(major), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HOME": "/nonexistent", "PATH": "/usr/bin:/bin", "KUBECONFIG": "/nonexistent"},
    )


def template(
    values: Mapping[str, Any] | None = None,
    *,
    files: tuple[str, ...] = ("default",),
    major: str = "4",
    kube: str = NEWEST,
    release: str = "tita",
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """Run `helm template` with values files of `ci/`, and values that override them."""
    settings = [f"--set-json={key}={json.dumps(value)}" for key, value in (values or {}).items()]
    return run_helm(
        "template", release, str(chart), "--namespace", "lab", "--kube-version", kube,
        *[f"--values={CHART / 'ci' / name}-values.yaml" for name in files], *settings,
        major=major,
    )  # fmt: skip


@cache
def _rendered(values: str, files: tuple[str, ...], major: str, kube: str, release: str) -> bytes:
    done = template(json.loads(values), files=files, major=major, kube=kube, release=release)
    assert done.returncode == 0, done.stderr
    objects = [o for o in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if o]
    return pickle.dumps(objects)


def render(
    values: Mapping[str, Any] | None = None,
    *,
    files: tuple[str, ...] = ("default",),
    major: str = "4",
    kube: str = NEWEST,
    release: str = "tita",
) -> Objects:
    """Render the chart. Results are cached; every call returns its own copy."""
    objects: Objects = pickle.loads(
        _rendered(json.dumps(values or {}), files, major, kube, release)
    )
    return objects


def find(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    """Return the only object of this kind and name."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} {kind} {name}"
    return found[0]


def pod_templates(objects: Objects) -> list[tuple[str, dict[str, Any]]]:
    """Return every pod or pod template as (kind/name, template)."""
    pods = []
    for o in objects:
        where = f"{o['kind']}/{o['metadata']['name']}"
        if o["kind"] == "Pod":
            pods.append((where, o))
        elif o["kind"] in ("Deployment", "StatefulSet"):
            pods.append((where, o["spec"]["template"]))
        elif o["kind"] == "CronJob":
            pods.append((where, o["spec"]["jobTemplate"]["spec"]["template"]))
    return pods


def containers(objects: Objects) -> list[tuple[str, dict[str, Any]]]:
    """Return every container as (kind/name, container)."""
    return [(where, c) for where, pod in pod_templates(objects) for c in pod["spec"]["containers"]]


def environment(container: Mapping[str, Any]) -> dict[str, Any]:
    """Map names of environment variables to their value, or to `valueFrom`."""
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container.get("env", [])}


@pytest.fixture(scope="session")
def chart() -> SimpleNamespace:
    """The functions above, and the versions under test."""
    functions: dict[str, Callable[..., Any]] = {
        "containers": containers,
        "environment": environment,
        "find": find,
        "load_script": load_script,
        "pod_templates": pod_templates,
        "render": render,
        "run_helm": run_helm,
        "template": template,
    }
    return SimpleNamespace(
        root=ROOT, path=CHART, helms=HELMS, oldest=OLDEST, newest=NEWEST, **functions
    )


@pytest.fixture(params=["default", "full", "trial"])
def objects(request: pytest.FixtureRequest) -> Objects:
    """Objects rendered from each values file of `ci/`."""
    return render(files=(request.param,))


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tools(request: pytest.FixtureRequest, chart: SimpleNamespace) -> Path:
    """The directory with helm (4 unless parametrized) and kubectl."""
    major = getattr(request, "param", "4")
    folder: Path = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir(major)
    return folder


@pytest.fixture
def run(api: ApiServer, tools: Path, tmp_path: Path) -> Command:
    """Run helm or kubectl against the API server."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(api.kubeconfig())

    def command(tool: str, *arguments: str) -> str:
        done = subprocess.run(
            [tools / tool, *arguments, "--namespace", "lab"],
            env={"KUBECONFIG": str(kubeconfig), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    return command


@pytest.fixture
def deploy(run: Command, chart: SimpleNamespace) -> Callable[..., str]:
    """Run `helm install` or `helm upgrade` with a values file of `ci/`."""

    def command(verb: str, files: str, *flags: str, folder: Path | None = None) -> str:
        return run(
            "helm", verb, "tita", str(folder or chart.path), "--disable-openapi-validation",
            f"--values={chart.path / 'ci' / files}-values.yaml", *flags,
        )  # fmt: skip

    return command
