"""Runs in the store, and the pointer that inference follows."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tita.cli.commands import app
from tita.cli.main import run
from tita.errors import DamagedData, ExitCode, TitaError
from tita.launch import runs
from tita.launch.promotion import promote, rollback
from tita.launch.runs import (
    CURRENT,
    compare,
    evaluations,
    last_checkpoint,
    list_runs,
    read_curve,
    read_run,
)
from tita.records import TrainProgress, ValidationFigures, read_progress
from tita.storage import Store, open_store, resolve
from tita.storage.locate import read_pointer


def progress(step: int, loss: float) -> str:
    record = TrainProgress(
        step=step, steps=4, loss=loss, reward_margin=0.1, reward_accuracy=0.6, learning_rate=1e-6,
        samples_per_s=2.0, seconds_left=0.0, peak_memory_bytes=1,
    )  # fmt: skip
    return json.dumps({"progress": asdict(record)})


@pytest.fixture(params=["directory", "s3"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """Two complete runs and an incomplete one."""
    where = str(tmp_path / "store")
    if request.param == "s3":
        where = request.getfixturevalue("s3_environment")["TITA_STORE"]
    opened = open_store(where)
    for name, beta, loss in (("one", 0.1, 0.6), ("two", 0.2, 0.4)):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text(json.dumps({"made_by": name}))
        # A run that was interrupted wrote step 3 twice.
        steps = [progress(2, 0.9), progress(3, 0.8), progress(3, 0.7), progress(4, loss)]
        (folder / "train.jsonl").write_text("\n".join(steps))
        meta = {"job": "train-dpo", "run": name, "recipe": {"beta": beta, "epochs": 1}}
        facts = {"start_model": {"name": "tiny"}, "release": "tita", "namespace": f"of-{name}"}
        (folder / "run.json").write_text(json.dumps({**facts, **meta}))
        opened.push_tree(folder, f"runs/{name}", meta=meta)
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "weights").write_text("x")
    for step, nodes in ((90, 2), (100, 2), (1000, 1)):  # the newest lacks a node
        for node in range(nodes):
            opened.push_tree(tmp_path / "node", f"runs/open/checkpoints/{step}/node-{node}")
    return opened


def test_list_runs(store: Store) -> None:
    rows = {record.run: record.row() for record in list_runs(store)}
    assert {run: row["state"] for run, row in rows.items()} == {
        "one": "done", "two": "done", "open": "open",
    }  # fmt: skip
    assert (rows["two"]["loss"], rows["two"]["step"]) == (0.4, "4/4")
    assert (rows["two"]["release"], rows["two"]["namespace"]) == ("tita", "of-two")
    assert read_run(store, "open").checkpoints == ("90", "100")


def test_damaged_run_does_not_hide_others(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.put("runs/one/run.json", b"{")
    store.put("runs/two/manifest.json", b"{")
    assert [record.run for record in list_runs(store)] == ["open"]
    said = capsys.readouterr().err
    assert f"skipped {store.uri}/runs/one/run.json: not JSON" in said
    assert f"skipped {store.uri}/runs/two/manifest.json: invalid manifest" in said
    with pytest.raises(DamagedData, match="not JSON"):
        read_run(store, "one")


def test_last_complete_checkpoint(store: Store) -> None:
    found = last_checkpoint("open", store=store.uri)
    assert found is not None
    assert found.endswith("runs/open/checkpoints/100")
    assert last_checkpoint("open", store=store.uri, num_nodes=3) == ""
    assert last_checkpoint("one", store=store.uri) == ""
    assert last_checkpoint("one", store="gs://elsewhere") is None


def test_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run is reported while its store is away, or not to be reached from here."""
    requests: list[str] = []

    class Away(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Away) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TITA_S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setattr(runs, "_STORE_PATIENCE_S", 0.0)
        assert last_checkpoint("r", store="s3://bucket/x") is None
        server.shutdown()
    assert len(requests) <= 1


def test_compare(store: Store) -> None:
    rows = {row[""]: row for row in compare(store, ["one", "two"])}
    assert (rows["beta"]["one"], rows["beta"]["two"]) == (0.1, 0.2)
    assert "epochs" not in rows
    assert rows["loss"]["two"] == 0.4


def current_model(store: Store) -> str:
    """The model that inference would load."""
    made_by: str = json.loads((resolve(CURRENT, store=store) / "config.json").read_text())[
        "made_by"
    ]
    return made_by


def test_promote_and_roll_back(store: Store) -> None:
    with pytest.raises(TitaError, match=r"no previous model to roll back to; promote the run"):
        rollback(store)
    promote(store, "one")
    assert current_model(store) == "one"
    promote(store, "two")
    promote(store, "two")  # moves nothing, and forgets nothing
    assert read_run(store, "two").promoted
    assert current_model(store) == "two"
    rollback(store)
    assert current_model(store) == "one"
    pointer = read_pointer(store, CURRENT)
    assert pointer is not None
    assert pointer.target == "runs/one/model"


@pytest.mark.parametrize(("run", "words"), [("open", "not complete"), ("none", "no run 'none'")])
def test_runs_that_cannot_be_promoted(store: Store, run: str, words: str) -> None:
    with pytest.raises(TitaError, match=words):
        promote(store, run)


def test_run_without_a_model_is_not_promoted(store: Store, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "run.json").write_text("{}")
    store.push_tree(tmp_path / "pairs", "runs/pairs")
    with pytest.raises(TitaError, match="has no model"):
        promote(store, "pairs")


def test_commands(store: Store) -> None:
    def tita(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tita", *arguments, "--store", store.uri]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert json.loads(tita("promote", "one", "--no-roll", "-o", "json").stdout) == {
        "reward/current": "runs/one/model", "restarted": "",
    }  # fmt: skip
    listed = json.loads(tita("runs", "list", "-o", "json").stdout)
    assert {row["run"]: row["promoted"] for row in listed}["one"] == "yes"
    shown = tita("runs", "show", "one")
    assert "tiny" in shown.stdout
    assert "beta" in shown.stdout
    assert "beta" in tita("runs", "compare", "one", "two").stdout
    assert tita("promote", "nobody").returncode == ExitCode.USER


HELD_OUT = ValidationFigures(
    step=2, loss=0.5, margin=0.4, accuracy=0.76, other_loss=0.7, other_margin=0.1,
    other_accuracy=0.75, image_effect=0.01, image_effect_low=-0.05, image_effect_high=0.07,
)  # fmt: skip


@pytest.fixture
def evaluated(tmp_path: Path) -> Store:
    """One run whose held-out pairs were evaluated twice, and which kept the first weights."""
    opened, folder = open_store(str(tmp_path / "store")), tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    last = replace(HELD_OUT, step=4, loss=0.9)
    lines = [
        json.dumps({"progress": asdict(replace(read_progress(text), validation=figures))})  # type: ignore[type-var]
        for text, figures in (
            (progress(2, 0.6), HELD_OUT),
            (progress(3, 0.5), HELD_OUT),
            (progress(4, 0.4), last),
        )
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    facts = {"pairs": 12, "images": 4, **asdict(HELD_OUT)}
    meta = {"job": "train-dpo", "run": "seen", "recipe": {}}
    warnings = ["the reward model prefers as well without seeing"]
    record = {**meta, "validation": facts, "warnings": warnings}
    (folder / "run.json").write_text(json.dumps(record))
    opened.push_tree(folder, "runs/seen", meta=meta)
    return opened


def test_held_out_pairs_are_shown_and_compared(
    evaluated: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_run(evaluated, "seen")
    # Of the weights that were kept, not of the last step.
    assert record.held_out == HELD_OUT
    assert record.row()["image"] == 0.01
    rows = {row[""]: row["seen"] for row in compare(evaluated, ["seen"])}
    assert (rows["held_out.loss"], rows["held_out.other_accuracy"]) == (0.5, 0.75)
    assert [row["step"] for row in evaluations(read_curve(evaluated, "seen"))] == [2, 4]
    assert run(app, ["runs", "show", "seen", "--store", evaluated.uri], name="tita") == 0
    shown = capsys.readouterr()
    assert "other images" in shown.out
    assert "warning: the reward model prefers as well without seeing" in shown.err
    assert run(app, ["runs", "compare", "seen", "--store", evaluated.uri], name="tita") == 0
    assert "held_out.image_effect" in capsys.readouterr().out


def test_a_promotion_repeats_the_warnings(
    evaluated: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(evaluated, "seen")
    said = capsys.readouterr().err
    assert "warning: run 'seen': the reward model prefers as well without seeing" in said


@pytest.mark.parametrize("number", ["NaN", "null"])
def test_a_run_that_diverged_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    """Files of earlier versions have NaN; `-o json` and `-o yaml` have null for it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    opened, folder = open_store(str(tmp_path / "store")), tmp_path / "run"
    folder.mkdir()
    diverged = progress(2, 7.25).replace("7.25", number)
    held_out = json.dumps(asdict(replace(HELD_OUT, loss=7.25))).replace("7.25", number)
    (folder / "train.jsonl").write_text(f"{progress(1, 0.5)}\n{diverged}\n")
    (folder / "run.json").write_text(f'{{"validation": {held_out}}}')
    opened.push_tree(folder, "runs/lost", meta={"job": "train-dpo", "run": "lost", "recipe": {}})
    assert len(list(read_curve(opened, "lost"))) == 2
    for command in (["show", "lost"], ["list"], ["compare", "lost"]):
        asked = ["runs", *command, "--store", opened.uri]
        assert run(app, asked, name="tita") == 0
        assert "nan" in capsys.readouterr().out
        assert run(app, [*asked, "-o", "json"], name="tita") == 0
        assert "null" in capsys.readouterr().out
    assert run(app, ["runs", "show", "lost", "--store", opened.uri, "-o", "json"], name="tita") == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [step["loss"] for step in shown["curve"]] == [0.5, None]
    assert shown["facts"]["validation"]["loss"] is None
