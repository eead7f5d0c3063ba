"""A run in MLflow and Weights & Biases: live, resumed, and without their keys in any output."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from tests.train.conftest import Start
from tita.cli.commands import app
from tita.cli.main import run
from tita.errors import ExitCode, Preempted, TitaError
from tita.gang import free_port
from tita.recipes import TrainRecipe, missing_trackers, validate_recipe
from tita.storage import Store, open_store
from tita.storage.locate import trackers_key
from tita.train import trackers
from tita.train.run import dpo_options

PASSWORD = "password-of-the-tracker"


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real MLflow server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/runs.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    log = (folder / "log").open("w")
    # Its job runner keeps a core busy.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(
        command, stdout=log, stderr=log, env=env, start_new_session=True
    ) as process:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                httpx.get(f"{url}/health", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            pytest.fail((folder / "log").read_text())
        yield url
        os.killpg(process.pid, signal.SIGKILL)


def steps_in(mlflow: str, run_id: str) -> list[int]:
    """Steps of the run's `loss` that MLflow has."""
    query = {"run_id": run_id, "metric_key": "loss"}
    answer = httpx.get(
        f"{mlflow}/api/2.0/mlflow/metrics/get-history", params=query, trust_env=False
    )
    return [int(each["step"]) for each in answer.json().get("metrics", [])]


def runs_in(mlflow: str, experiment: str) -> list[dict[str, Any]]:
    api = f"{mlflow}/api/2.0/mlflow"
    query = {"experiment_name": experiment}
    found = httpx.get(f"{api}/experiments/get-by-name", params=query, trust_env=False).json()
    body = {"experiment_ids": [found["experiment"]["experiment_id"]]}
    runs = httpx.post(f"{api}/runs/search", json=body, trust_env=False).json()["runs"]
    return list(runs)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_tracked_runs(
    start: Start, mlflow: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are there while it trains; the link is in `tita runs show` from then on."""
    with_password = mlflow.replace("http://", f"http://user:{PASSWORD}@")
    env = {
        "MLFLOW_TRACKING_URI": with_password,
        "MLFLOW_EXPERIMENT_NAME": "t",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_API_KEY": PASSWORD.ljust(40, "0"),
        "NO_PROXY": "127.0.0.1",
    }
    store = tmp_path / "store"
    options = {"report_to": ["mlflow", "wandb", "tensorboard"], "env": env, "procs": 1}
    job = start(store, **options)
    job.run_until(5)
    record = json.loads(open_store(store).get(trackers_key("runs/a")))["trackers"]
    run_id = record["mlflow"]["id"]
    until = time.monotonic() + 60
    while not steps_in(mlflow, run_id):
        assert time.monotonic() < until, "no figures while the run is in progress"
        time.sleep(0.2)
    job.process.send_signal(signal.SIGTERM)
    first = job.finish()
    assert first.code == ExitCode.RETRY, first.text
    (only,) = runs_in(mlflow, "t")
    assert (only["info"]["run_name"], only["info"]["status"]) == ("a", "KILLED")
    second = start(store, **options).finish()
    assert second.code == 0, second.text
    (only,) = runs_in(mlflow, "t")
    assert (only["info"]["run_id"], only["info"]["status"]) == (run_id, "FINISHED")
    assert sorted(set(steps_in(mlflow, run_id))) == list(range(1, 13))
    # Two offline folders of one tracked run, which `wandb sync` merges.
    offline = list(tmp_path.glob("wandb/offline-run-*"))
    assert len(offline) == 2
    assert {folder.name.rpartition("-")[2] for folder in offline} == {record["wandb"]["id"]}
    assert all(next(iter(folder.glob("run-*.wandb"))).stat().st_size for folder in offline)
    assert len(list((store / "tensorboard/runs/a").glob("events.out.tfevents*"))) == 2
    link = f"{mlflow}/#/experiments/{only['info']['experiment_id']}/runs/{run_id}"
    assert record["mlflow"]["url"] == link
    assert run(app, ["runs", "show", "a", "--store", str(store)], name="tita") == 0
    shown = capsys.readouterr()
    assert f"mlflow: {link}" in shown.err
    assert run(app, ["runs", "show", "a", "-o", "json", "--store", str(store)], name="tita") == 0
    assert json.loads(capsys.readouterr().out)["trackers"]["mlflow"] == link
    kept = b"".join(file.read_bytes() for file in store.rglob("*") if file.is_file())
    assert PASSWORD.encode() not in kept
    assert PASSWORD not in first.text + second.text + shown.out + shown.err


@pytest.mark.slow
def test_a_tracker_that_is_unreachable_is_one_line(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow does not report its use to its authors either, as it would outside of tests."""
    for name in ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://user:{PASSWORD}@127.0.0.1:{free_port()}"
    env = {
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    (tmp_path / "tmp").mkdir()
    ended = start(tmp_path, report_to="mlflow", env=env, procs=1).finish()
    assert ended.code == ExitCode.USER, ended.text
    (line,) = (line for line in ended.text.splitlines() if "cannot open the tracked run" in line)
    assert line.startswith("train-dpo: mlflow: ")
    assert "Traceback" not in ended.text
    assert PASSWORD not in ended.text
    assert not (tmp_path / "config" / "mlflow").exists()
    # TRL imports wandb, whose temporary folders nobody would remove.
    assert not list((tmp_path / "tmp").glob("*wandb*"))


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_refused_before_the_gang(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'wandb' else real(name, *a)\n"
    )
    env = {"PYTHONPATH": f"{tmp_path / 'hide'}:{os.environ.get('PYTHONPATH', '')}"}
    # Node 0 of two would wait for its peer.
    ended = start(tmp_path, report_to="wandb", env=env | {"TITA_NUM_NODES": "2"}).finish()
    assert ended.code == ExitCode.USER, ended.text
    assert "report_to: wandb is not installed here; install tita[wandb]" in ended.text


def recipe_of(**changes: Any) -> TrainRecipe:
    return validate_recipe(TrainRecipe, {"model": "m", "pairs": "p", **changes})


def test_names_are_read_and_checked() -> None:
    assert recipe_of(report_to="mlflow").report_to == ("mlflow",)
    assert recipe_of(report_to=["wandb", "mlflow", "wandb"]).report_to == ("wandb", "mlflow")
    with pytest.raises(TitaError, match="report_to"):
        recipe_of(report_to="neptune")
    assert missing_trackers(recipe_of(report_to="tensorboard")) == []


@pytest.fixture
def this_run(tmp_path: Path) -> Any:
    store: Store = open_store(tmp_path / "store")
    return SimpleNamespace(store=store, out="runs/a", name="a", recipe=recipe_of())


def test_a_new_run_of_the_same_name_gets_tracked_runs_of_its_own(
    this_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The links of the last launch are followed by a retry, or to resume from its checkpoints."""
    key, links = trackers_key("runs/a"), {"wandb": {"id": "1", "url": "u"}}
    this_run.store.put(key, json.dumps({"launch": "x", "trackers": links}).encode())
    for launch, expected in (("x", links), ("y", {}), (None, {})):
        monkeypatch.setattr(
            trackers, "settings", lambda launch=launch: SimpleNamespace(launch_uid=launch)
        )
        assert trackers._known_links(this_run, key=key) == expected
    this_run.store.put("runs/a/checkpoints/1/x", b"1")
    assert trackers._known_links(this_run, key=key) == links


@pytest.mark.parametrize("stopped", [False, True])
def test_a_tracker_that_fails_at_the_end_does_not_end_the_run(
    this_run: Any,
    stopped: bool,
    lone_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: str) -> None:
        raise OSError(f"no answer of http://me:{PASSWORD}@host\nmore")

    this_run.recipe = recipe_of(report_to="mlflow")
    monkeypatch.setitem(trackers._OPEN, "mlflow", lambda *_: {"url": "u"})
    monkeypatch.setitem(trackers._CLOSE, "mlflow", fail)
    ended = pytest.raises(Preempted) if stopped else nullcontext()
    with ended, trackers.tracked_runs(this_run):
        if stopped:
            raise Preempted("SIGTERM")
    said = capsys.readouterr().err
    assert "mlflow: cannot close the tracked run (no answer of http://***@host)" in said


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_silent_at_the_end_does_not_keep_the_run(
    this_run: Any,
    name: str,
    lone_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is uploaded afterwards."""
    silent = threading.Event()
    this_run.recipe = recipe_of(report_to=name)
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setitem(trackers._OPEN, name, lambda *_: {"url": "u"})
    monkeypatch.setattr("wandb.finish", lambda **_: silent.wait(60))
    monkeypatch.setattr("mlflow.flush_async_logging", lambda: silent.wait(60))
    with trackers.tracked_runs(this_run):
        pass
    silent.set()
    said = capsys.readouterr().err
    assert f"{name}: cannot close the tracked run (no answer for 0.05 s)" in said


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc123")
    text = trackers.hide_secrets("key abc123 for https://me:pw@host/x")
    assert text == "key *** for https://***@host/x"


def test_an_address_is_required(this_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TitaError, match="no MLFLOW_TRACKING_URI"):
        trackers._open_mlflow(this_run, {})
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    this_run.store = SimpleNamespace(uri="s3://bucket/x")
    with pytest.raises(TitaError, match="no TENSORBOARD_LOGGING_DIR"):
        trackers._open_tensorboard(this_run, {})


def test_a_folder_of_tensorboard_that_cannot_be_written_is_refused_at_the_start(
    this_run: Any,
    lone_rank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "a"))
    this_run.recipe = recipe_of(report_to="tensorboard")
    with (
        pytest.raises(TitaError, match="Not a directory") as found,
        trackers.tracked_runs(this_run),
    ):
        pass
    assert str(found.value).startswith("tensorboard: cannot open the tracked run (")
    assert "remove it from report_to" in str(found.value)


def test_a_tracker_that_fails_during_training_gets_no_more_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real callback on a disk that is full, and others, which go on."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    tracker, other = TensorBoardCallback(), TrainerCallback()
    handler = CallbackHandler([DefaultFlowCallback, tracker, other], None, None, None, None)
    args = SimpleNamespace(report_to=["tensorboard"], to_json_string=lambda: "{}")
    trackers.guard_trackers(SimpleNamespace(args=args, callback_handler=handler))
    state, control = TrainerState(global_step=1), TrainerControl()
    handler.on_train_begin(args, state, control)
    handler.on_log(args, state, control, {"loss": 1.0})

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker.tb_writer, "flush", fail)
    seen: list[float] = []
    monkeypatch.setattr(other, "on_log", lambda *_, logs, **__: seen.append(logs["loss"]))
    for step in (2, 3):
        state.global_step = step
        assert handler.on_log(args, state, control, {"loss": float(step)}) is control
    handler.on_train_end(args, state, control)
    assert seen == [2.0, 3.0]
    said = capsys.readouterr().err
    assert said.count("warning: tensorboard: [Errno 28] No space left on device; it gets no") == 1
    assert said.count("tensorboard") == 1


def test_a_restarted_run_goes_on_without_a_tracker_that_is_gone(
    this_run: Any,
    lone_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the first start the same error is refused; links stay for a start that reports again."""

    def fail(*_: Any) -> dict[str, str]:
        raise OSError("connection refused")

    monkeypatch.setitem(trackers._OPEN, "mlflow", fail)
    monkeypatch.setitem(trackers._OPEN, "tensorboard", lambda *_: {"url": "t"})
    this_run.recipe = recipe_of(report_to=["mlflow", "tensorboard"])
    with (
        pytest.raises(TitaError, match="cannot open the tracked run"),
        trackers.tracked_runs(this_run),
    ):
        pass
    key, links = trackers_key("runs/a"), {"mlflow": {"id": "1", "url": "u"}, "wandb": {"url": "w"}}
    this_run.store.put(key, json.dumps({"launch": None, "trackers": links}).encode())
    this_run.store.put("runs/a/checkpoints/1/x", b"1")
    with trackers.tracked_runs(this_run) as names:
        assert names == ["tensorboard"]
    said = capsys.readouterr().err
    assert "warning: mlflow: cannot open the tracked run (connection refused)" in said
    monkeypatch.setitem(trackers._OPEN, "mlflow", trackers._open_mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with trackers.tracked_runs(this_run) as names:
        assert names == ["tensorboard"]
    assert "warning: mlflow: no MLFLOW_TRACKING_URI" in capsys.readouterr().err
    kept = json.loads(this_run.store.get(key))["trackers"]
    assert kept == {**links, "tensorboard": {"url": "t"}}
    # Its callback would open it again, and fail.
    options = dpo_options(this_run.recipe, folder=Path("x"), on_gpu=False, trackers=names)
    assert options["report_to"] == ["tensorboard"]
