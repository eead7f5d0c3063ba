"""`tita promote` with a cluster: what it checks before it moves the pointer, and afterwards."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tita.errors import ExitCode
from tita.launch.runs import CURRENT
from tita.records import loaded_model_line, read_loaded_model
from tita.storage import Store, open_store
from tita.storage.locate import read_pointer

STAMP = "kubectl.kubernetes.io/restartedAt"
LABELS = {"app.kubernetes.io/instance": "tita", "app.kubernetes.io/component": "inference"}


@pytest.fixture
def store(s3_environment: dict[str, str], tmp_path: Path) -> Store:
    """A store with one complete run."""
    opened = open_store(s3_environment["TITA_STORE"])
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    opened.push_tree(tmp_path / "run", "runs/one", meta={"job": "train-dpo", "run": "one"})
    return opened


def put_deployment(lab: Any, store: Store, *, name: str = "tita-inference", **more: Any) -> None:
    environment = [{"name": "TITA_STORE", "value": more.get("reads", store.uri)}]
    rewards = [f"--reward={reward}" for reward in more.get("rewards", [CURRENT])]
    arguments = ["serve", "--base=base", *rewards]
    container = {"name": "tita", "args": arguments, "env": environment}
    labels = {**LABELS, "app.kubernetes.io/name": "tita"} | more.get("labels", {})
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    item = {
        "metadata": {"name": name, "labels": labels, "generation": 1},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template},
        "status": {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1}
        | {"availableReplicas": 1},
    }
    lab.api.put("deployments.apps", item)


def act_as_controller(lab: Any, loaded: str, *, role: str = "reward", ready: bool = True) -> None:
    """After the restart, create a new pod that says what it loaded, and finish the rollout."""

    def act() -> None:
        def restarted() -> Any:
            item = lab.api.get("deployments.apps", "tita-inference")
            return item["spec"]["template"]["metadata"].get("annotations")

        lab.until(restarted, timeout_s=40.0)
        item = lab.api.get("deployments.apps", "tita-inference")
        template = item["spec"]["template"]["metadata"]
        pod = lab.api.pod("inference", node="node-1", suffix="new")
        made = lab.api.get("pods", pod)
        made["metadata"] |= {"labels": template["labels"], "annotations": template["annotations"]}
        lab.api.put("pods", made)
        lab.api.write(pod, "starting", loaded_model_line(role, loaded, "0.1 million"), "GET /")
        item["status"]["observedGeneration"] = item["metadata"]["generation"]
        if not ready:
            reason = {"reason": "ProgressDeadlineExceeded", "message": "ReplicaSet timed out"}
            item["status"]["conditions"] = [{"type": "Progressing", "status": "False", **reason}]
            item["status"]["updatedReplicas"] = 0
        lab.api.put("deployments.apps", item)

    threading.Thread(target=act, daemon=True).start()


def promote(
    lab: Any, environment: dict[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tita", "promote", *options]
    clean = {**environment, "KUBECONFIG": lab.environment()["KUBECONFIG"]}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean)


def target(store: Store) -> str | None:
    pointer = read_pointer(store, CURRENT)
    return pointer.target if pointer else None


def test_promote_waits_and_verifies(lab: Any, store: Store, s3_environment: Any) -> None:
    put_deployment(lab, store)
    act_as_controller(lab, "runs/one/model")
    done = promote(lab, s3_environment, "one", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "reward/current": "runs/one/model", "restarted": "tita-inference",
    }  # fmt: skip


@pytest.mark.parametrize("loaded", ["runs/one/model", "runs/zero/model"])
def test_one_of_several_reward_models_follows_the_pointer(
    lab: Any, store: Store, s3_environment: Any, loaded: str
) -> None:
    put_deployment(lab, store, rewards=["brief=runs/brief/model", f"faithful={CURRENT}"])
    act_as_controller(lab, loaded, role="faithful")
    done = promote(lab, s3_environment, "one", "-o", "json")
    is_right = loaded == "runs/one/model"
    assert done.returncode == (ExitCode.OK if is_right else ExitCode.FAILED), done.stderr
    assert ("loaded runs/zero/model, not runs/one/model" in done.stderr) is not is_right


def test_another_model_is_an_error(lab: Any, store: Store, s3_environment: Any) -> None:
    put_deployment(lab, store)
    act_as_controller(lab, "runs/zero/model")
    done = promote(lab, s3_environment, "one")
    assert done.returncode == ExitCode.FAILED
    assert "loaded runs/zero/model, not runs/one/model" in done.stderr
    assert f"`tita runs list --store {store.uri}` marks the promoted run" in done.stderr


def test_pods_that_never_become_ready(lab: Any, store: Store, s3_environment: Any) -> None:
    put_deployment(lab, store)
    act_as_controller(lab, "runs/one/model", ready=False)
    done = promote(lab, s3_environment, "one", "-n", "lab")
    assert done.returncode == ExitCode.FAILED
    assert "ReplicaSet timed out" in done.stderr
    assert f"tita promote --rollback -n lab --store {store.uri}`" in done.stderr


def test_inference_of_a_renamed_release_is_restarted(
    lab: Any, store: Store, s3_environment: Any
) -> None:
    """With nameOverride the labels have another name; other charts have inference, too."""
    put_deployment(lab, store, labels={"app.kubernetes.io/name": "vlm"})
    container = {"name": "server", "args": ["serve"]}
    spec = {"template": {"spec": {"containers": [container]}}}
    labels = LABELS | {"app.kubernetes.io/instance": "other"}
    lab.api.put("deployments.apps", {"metadata": {"name": "x", "labels": labels}, "spec": spec})
    done = promote(lab, s3_environment, "one", "--no-wait", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["restarted"] == "tita-inference"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reads": "s3://tita/other"}, "reads the store s3://tita/other, not s3://"),
        ({"rewards": ["models/fixed"]}, "loads models/fixed, not reward/current"),
    ],
)
def test_nothing_moves_where_inference_would_not_follow(
    lab: Any, store: Store, s3_environment: Any, more: dict[str, Any], words: str
) -> None:
    put_deployment(lab, store, **more)
    done = promote(lab, s3_environment, "one")
    assert done.returncode == ExitCode.USER
    assert words in done.stderr
    assert target(store) is None
    assert not any(request.startswith("PATCH") for request in lab.api.requests)
    assert promote(lab, s3_environment, "one", "--no-roll").returncode == 0
    assert target(store) == "runs/one/model"


def test_nothing_moves_without_the_right_to_restart(
    lab: Any, store: Store, s3_environment: Any
) -> None:
    put_deployment(lab, store)
    lab.api.denied.add(("patch", "deployments.apps"))
    done = promote(lab, s3_environment, "one")
    assert done.returncode == ExitCode.USER
    assert "no permission to restart it" in done.stderr
    assert target(store) is None


def test_nothing_moves_between_two_releases(lab: Any, store: Store, s3_environment: Any) -> None:
    put_deployment(lab, store)
    other = {"app.kubernetes.io/instance": "vlm"}
    put_deployment(lab, store, name="vlm-inference", labels=other)
    done = promote(lab, s3_environment, "one")
    assert done.returncode == ExitCode.USER
    assert "set --release tita or --release vlm" in done.stderr
    assert target(store) is None


def test_no_kubeconfig_advises_the_option_that_needs_none(
    store: Store, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tita", "promote", "one"]
    nowhere = {**s3_environment, "KUBECONFIG": str(tmp_path / "none")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=nowhere)
    assert done.returncode == ExitCode.USER
    assert "no kubeconfig; set KUBECONFIG, or use --no-roll" in done.stderr
    assert target(store) is None


def test_log_line_of_a_loaded_model() -> None:
    line = loaded_model_line("reward", "runs/one/model", "0.3 million parameters on cpu")
    assert read_loaded_model(f"2026-11-29T00:00:00Z {line}") == ("reward", "runs/one/model")
    assert read_loaded_model("tita serve: loading the reward model reward/current") is None
