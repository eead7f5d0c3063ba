"""Data that a recipe names is looked for before GPUs are held."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tita.errors import ExitCode, TitaError
from tita.launch.objects import CONTAINER, JOB_LABEL
from tita.launch.preflight import CheckStatus, check_data
from tita.settings import settings
from tita.storage import Store, open_store
from tita.storage.locate import check_exists


@pytest.fixture(params=["directory", "s3"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A store with the tree `pairs/good`."""
    where = str(tmp_path / "store")
    if request.param == "s3":
        where = request.getfixturevalue("s3_environment")["TITA_STORE"]
    opened = open_store(where)
    (tmp_path / "good" / "sub").mkdir(parents=True)
    (tmp_path / "good" / "sub" / "pairs.jsonl").write_text("{}")
    opened.push_tree(tmp_path / "good", "pairs/good")
    opened.push_tree(tmp_path / "good", "data")
    return opened


@pytest.mark.parametrize("where", ["pairs/good", "pairs/good/sub", "pairs/good/sub/pairs.jsonl"])
def test_what_is_in_the_store(store: Store, where: str) -> None:
    check_exists(where, store=store)
    if store.uri.startswith("s3://"):
        check_exists(f"{store.uri}/{where}", store=store)


@pytest.mark.parametrize("where", ["pairs/nope", "pairs", "pairs/good/su", "./nope", "/nope"])
def test_what_is_not(store: Store, where: str) -> None:
    with pytest.raises(TitaError, match=r"neither a complete tree|no such file"):
        check_exists(where, store=store)


def launch(lab: Any, environment: dict[str, str], pairs: str) -> subprocess.CompletedProcess[str]:
    for key, item in list(lab.api.objects.items()):
        if key[0] == "cronjobs.batch":
            spec = item["spec"]["jobTemplate"]["spec"]["template"]["spec"]
            names = ("TITA_STORE", "TITA_S3_ENDPOINT_URL")
            container = spec["containers"][0]
            container["env"] = [e for e in container["env"] if e["name"] not in names]
            container["env"] += [{"name": name, "value": environment[name]} for name in names]
            lab.api.put(key[0], item)
    command = ["launch", "train-dpo", "--set", f"pairs={pairs}", "--detach", "-o", "json"]
    return subprocess.run(
        [sys.executable, "-m", "tita", *command], capture_output=True, text=True, timeout=60,
        env={**environment, "KUBECONFIG": lab.environment()["KUBECONFIG"]},
    )  # fmt: skip


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_terminal_refuses_pairs_that_are_not_in_the_store(
    lab: Any, store: Store, s3_environment: dict[str, str]
) -> None:
    assert store.uri == s3_environment["TITA_STORE"]
    done = launch(lab, s3_environment, "pairs/nope")
    assert done.returncode == ExitCode.USER
    assert "bad data: pairs: pairs/nope: neither a complete tree in the store" in done.stderr
    assert f"`tita data push FOLDER pairs/nope --store {store.uri}`" in done.stderr
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)
    assert launch(lab, s3_environment, "pairs/good").returncode == 0


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_terminal_without_credentials_leaves_it_to_the_pod(
    lab: Any, store: Store, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    without = {name: value for name, value in s3_environment.items() if name not in keys}
    without |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    assert launch(lab, without, "pairs/nope").returncode == 0
    done = launch(lab, {**without, "AWS_PROFILE": "typo"}, "pairs/nope")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_terminal_that_does_not_pay_for_requests_leaves_it_to_the_pod(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "TITA_STORE": store.uri,
        "TITA_S3_ENDPOINT_URL": os.environ["TITA_S3_ENDPOINT_URL"],
        "TITA_S3_REQUESTER_PAYS": "true",
        "TITA_RECIPE": json.dumps({"pairs": "pairs/nope", "model": "reward/start"}),
    }
    env = [{"name": name, "value": value} for name, value in variables.items()]
    manifest = {
        "metadata": {"labels": {JOB_LABEL: "train-dpo"}},
        "spec": {"template": {"spec": {"containers": [{"name": CONTAINER, "env": env}]}}},
    }
    assert check_data(manifest).text == "checked by the first pod"
    monkeypatch.setenv("TITA_S3_REQUESTER_PAYS", "true")
    settings.cache_clear()
    assert check_data(manifest).mark is CheckStatus.BAD


def test_the_first_pod_ends_before_it_waits_for_others(tmp_path: Path) -> None:
    environment = {
        **os.environ, "TITA_STORE": str(tmp_path / "store"), "TITA_NUM_NODES": "2",
        "TITA_TERMINATION_LOG": str(tmp_path / "word"), "TITA_RUN": "r",
        "TITA_RECIPE": json.dumps({"pairs": "pairs/nope", "model": "reward/start"}),
    }  # fmt: skip
    command = [sys.executable, "-m", "tita", "train-dpo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == ExitCode.USER
    assert "pairs: neither a complete tree" in done.stderr
    assert "waiting for" not in done.stderr
