"""Kubeconfigs are read as the official client reads them."""

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from tita.errors import TitaError
from tita.launch.kubeconfig import load_access


def write(path: Path, user: dict[str, Any], **context: str) -> Path:
    content = {
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443/"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", **context}},
            {"name": "there", "context": {"cluster": "c", "user": "u", "namespace": "far"}},
        ],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def plugin(folder: Path, token: str) -> dict[str, Any]:
    status = {"token": token}
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
    script = folder / "plugin.py"
    script.write_text(
        f"import os, json\nassert json.loads(os.environ['KUBERNETES_EXEC_INFO'])['kind']\n"
        f"print(json.dumps({answer | {'status': status}!r}))\n"
    )
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "interactiveMode": "Never",
        }
    }


@pytest.mark.parametrize("kind", ["token", "tokenFile", "exec"])
def test_same_answer_as_the_official_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "token").write_text("from-file\n")
    user = {
        "token": {"token": "abc"},
        "tokenFile": {"tokenFile": str(tmp_path / "token")},
        "exec": plugin(tmp_path, "from-plugin"),
    }[kind]
    config = write(tmp_path / "config", user)
    monkeypatch.setenv("KUBECONFIG", str(config))
    ours = load_access()
    theirs = Configuration()
    load_kube_config(str(config), client_configuration=theirs)
    assert ours.server == theirs.host
    assert theirs.api_key
    assert ours.headers()["Authorization"] == next(iter(theirs.api_key.values())).strip()


def test_name_and_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = {"username": "ada", "password": "secret"}
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", user)))
    expected = base64.b64encode(b"ada:secret").decode()
    assert load_access().headers() == {"Authorization": f"Basic {expected}"}


def test_context_and_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", {"token": "t"})))
    assert load_access().namespace == "default"
    assert load_access(context="there").namespace == "far"
    assert load_access(context="there", namespace="near").namespace == "near"
    with pytest.raises(TitaError, match="no context 'nowhere'"):
        load_access(context="nowhere")


def test_of_several_files_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", {"token": "first"})
    two = write(tmp_path / "two", {"token": "second"})
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join([str(tmp_path / "none"), str(one), str(two)]))
    assert load_access().headers() == {"Authorization": "Bearer first"}


def test_tokens_that_rotate_are_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("old")
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", {"tokenFile": "token"})))
    access = load_access()
    assert access.headers()["Authorization"] == "Bearer old"
    (tmp_path / "token").write_text("new")
    assert access.headers()["Authorization"] == "Bearer new"


def test_plugin_that_is_not_there_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"apiVersion": "v1", "command": "no-such-plugin", "installHint": "install it from X"}
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", {"exec": spec})))
    with pytest.raises(TitaError, match="install it from X"):
        load_access().headers()


def test_inside_a_pod_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("token", "pod-token"), ("namespace", "lab"), ("ca.crt", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("tita.launch.kubeconfig.SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    access = load_access()
    assert (access.server, access.namespace) == ("https://[fd00::1]:443", "lab")
    assert access.headers() == {"Authorization": "Bearer pod-token"}


def test_nothing_to_go_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(TitaError, match="no kubeconfig"):
        load_access()


def test_secrets_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = base64.b64encode(b"private").decode()
    user = {"token": "s3cret", "client-key-data": key}
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", user)))
    shown = repr(load_access())
    assert "s3cret" not in shown
    assert key not in shown
    assert json.dumps(shown)
