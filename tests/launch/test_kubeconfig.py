"""Clusters and credentials are found as kubectl finds them."""

import base64
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from kubernetes.config import incluster_config

from tita.errors import TitaError
from tita.launch.kubeconfig import ClusterAccess, load_access


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


def plugin(folder: Path, status: dict[str, str]) -> dict[str, Any]:
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


def authorization(access: ClusterAccess) -> str:
    """The header that the client sends."""
    headers: dict[str, str] = {}
    access.client.update_params_for_auth(headers, None, ["BearerToken"])
    return headers.get("authorization", "").strip()


BASIC = base64.b64encode(b"ada:secret").decode()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token", "Bearer abc"), ("tokenFile", "Bearer from-file"),
        ("exec", "Bearer from-plugin"), ("password", f"Basic {BASIC}"), ("anonymous", ""),
    ],
)  # fmt: skip
def test_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    (tmp_path / "token").write_text("from-file\n")
    user = {
        "token": {"token": "abc"},
        "tokenFile": {"tokenFile": "token"},
        "exec": plugin(tmp_path, {"token": "from-plugin"}),
        "password": {"username": "ada", "password": "secret"},
        "anonymous": {},
    }[kind]
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", user)))
    access = load_access()
    assert access.server == "https://10.0.0.1:6443"
    assert authorization(access) == expected


def test_context_and_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", {"token": "t"})))
    assert load_access().namespace == "default"
    assert load_access(context="there").namespace == "far"
    assert load_access(context="there", namespace="near").namespace == "near"
    with pytest.raises(TitaError, match="no context 'nowhere'"):
        load_access(context="nowhere")


def test_first_of_several_files_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", {"token": "first"})
    two = write(tmp_path / "two", {"token": "second"})
    two.write_text(two.read_text().replace("current-context: here", "current-context: there"))
    (tmp_path / "empty").touch()
    names = [str(tmp_path / "none"), str(tmp_path / "empty"), str(one), str(two)]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(names))
    access = load_access()
    assert authorization(access) == "Bearer first"
    assert access.namespace == "default", "the first file's current context"


def test_missing_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "config", {"token": "t"})
    config.write_text(config.read_text().replace("user: u", "user: nobody"))
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(TitaError, match="no user 'nobody'"):
        load_access()


def test_a_cluster_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "config", {"token": "t"})
    content = yaml.safe_load(path.read_text())
    content["clusters"][0]["cluster"] = {"insecure-skip-tls-verify": True}
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(TitaError, match=r"config: cluster 'c' has no server; add its address"):
        load_access()


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (("contexts",), [], "no context 'here'; see `kubectl config get-contexts`"),
        (("clusters",), None, "no cluster 'c'; add it"),
        (("users",), [], "no user 'u'; add it"),
        (("users",), ["u"], "an entry of users has no name; check it with"),
        (("clusters", 0), {"cluster": {}}, "an entry of clusters has no name; check it with"),
        (("contexts",), {"here": {}}, "an entry of contexts has no name; check it with"),
        (("contexts", 0, "context"), {}, "context 'here' names no cluster; check it with"),
        (("contexts", 0, "context"), "c", "context 'here' is invalid; check it with"),
        (("contexts", 0, "context", "namespace"), 5, "context 'here' is invalid"),
        (("clusters", 0, "cluster"), "c", "cluster 'c' is invalid"),
        (("clusters", 0, "cluster", "server"), 6443, "cluster 'c' is invalid"),
        (("clusters", 0, "cluster", "proxy-url"), 3128, "cluster 'c' is invalid"),
        (("clusters", 0, "cluster", "certificate-authority"), "/none/ca", "/none/ca; log in"),
        (("users", 0, "user"), "t", "user 'u' is invalid"),
        (("users", 0, "user", "exec"), "aws", "user 'u' is invalid"),
        (("users", 0, "user"), {"exec": {"apiVersion": "v1"}}, "the credential plugin failed"),
        (("users", 0, "user"), {"tokenFile": "/none/token"}, "'/none/token'; log in"),
        (("users", 0, "user"), {"auth-provider": {}}, "auth-provider was removed"),
        (("users", 0, "user"), {"client-certificate-data": "a"}, "not base64; log in"),
    ],
)
def test_a_broken_kubeconfig(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: tuple[str | int, ...],
    value: Any,
    what: str,
) -> None:
    config = write(tmp_path / "config", {"token": "secret"})
    content: Any = yaml.safe_load(config.read_text())
    entry = content
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    config.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(TitaError) as failure:
        load_access()
    assert (failure.value.where, bool(failure.value.remedy)) == (str(config), True)
    assert what in str(failure.value)
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize(("text", "what"), [("a: [", "not YAML"), ("- a", "not a kubeconfig")])
def test_a_file_that_is_no_kubeconfig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    config = tmp_path / "config"
    config.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(TitaError, match=rf"config: {what}.*; check it with `kubectl config view`"):
        load_access()


def test_missing_credential_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"apiVersion": "v1", "command": "no-such-plugin", "installHint": "install it from X"}
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", {"exec": spec})))
    with pytest.raises(TitaError, match=r"no-such-plugin.*install it from X"):
        load_access()


def test_failing_credential_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.exit('your session expired')"
    spec = {"apiVersion": "v1", "command": sys.executable, "args": ["-c", script]}
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "config", {"exec": spec})))
    with pytest.raises(TitaError, match=r"process returned 1. your session expired.*log in again"):
        load_access()


def test_pod_without_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("pod-token")
    (tmp_path / "namespace").write_text("lab\n")
    (tmp_path / "ca.crt").write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    access = load_access()
    assert (access.server, access.namespace) == ("https://[fd00::1]:443", "lab")
    assert authorization(access) == "bearer pod-token"
    (tmp_path / "token").write_text("rotated")
    assert access.renew_credential("bearer pod-token")
    assert authorization(access) == "bearer rotated"


def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    names = f"{tmp_path}/none:{tmp_path}/empty"
    monkeypatch.setenv("KUBECONFIG", names)
    with pytest.raises(TitaError, match=f"^{names}: no kubeconfig; set KUBECONFIG$"):
        load_access()


def test_secrets_do_not_show(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key = base64.b64encode(b"private").decode()
    user = {"token": "s3cret", "client-key-data": key}
    config = write(tmp_path / "config", user)
    monkeypatch.setenv("KUBECONFIG", str(config))
    shown = repr(load_access())
    assert "s3cret" not in shown
    assert key not in shown
    env = [{"name": "PASSWORD", "value": "s3cret"}, {"name": "TOKEN"}]
    plugin = {"command": "x", "apiVersion": "v1", "env": env}
    for broken in ({"exec": plugin}, {"client-certificate-data": "s3cret!"}):
        write(config, broken)
        with pytest.raises(TitaError) as caught:
            load_access()
        assert "s3cret" not in caplog.text + "".join(capfd.readouterr())
        assert "s3cret" not in str(caught.value)


def test_proxy_credentials_are_sent_and_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "config", {"token": "t"})
    monkeypatch.setenv("KUBECONFIG", str(config))
    monkeypatch.setenv("HTTPS_PROXY", "http://ada:p%40ss@proxy.test:3128")
    configuration = load_access().client.configuration
    expected = base64.b64encode(b"ada:p@ss").decode()
    assert configuration.proxy_headers == {"proxy-authorization": f"Basic {expected}"}
    monkeypatch.setenv("HTTPS_PROXY", "gopher://ada:p%40ss@proxy.test:3128")
    with pytest.raises(TitaError, match="HTTPS_PROXY") as caught:
        load_access()
    assert "p%40ss" not in str(caught.value)
