"""`make chart-package` signs the chart, and Helm verifies it."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

NAME = "tita test <test@tita.invalid>"


def gpg(home: Path, *arguments: str | Path) -> None:
    command = ["gpg", "--batch", "--quiet", "--homedir", home, *arguments]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("gpg") is None, reason="needs gpg to make a key")
def test_the_chart_is_packaged_with_provenance(chart: SimpleNamespace, tmp_path: Path) -> None:
    home = tmp_path / "gpg"
    home.mkdir(mode=0o700)
    gpg(home, "--passphrase", "", "--quick-generate-key", NAME, "rsa2048", "sign", "never")
    gpg(home, "--output", tmp_path / "secret.gpg", "--export-secret-keys")
    gpg(home, "--output", tmp_path / "public.gpg", "--export")
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
    tools = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir("4")
    folders = {"KEYRING": tmp_path / "secret.gpg", "PACKAGES": tmp_path / "packages"}
    done = subprocess.run(
        ["make", "chart-package", *(f"CHART_{name}={path}" for name, path in folders.items())],
        cwd=chart.root, env=os.environ | {"HELM_DIR": str(tools)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (package,) = (tmp_path / "packages").glob("tita-*.tgz")
    with tarfile.open(package) as archive:
        assert {"tita/Chart.yaml", "tita/jobs/train-dpo.yaml"} <= set(archive.getnames())
    verify = ("verify", str(package), "--keyring", str(tmp_path / "public.gpg"))
    for major in ("3", "4"):
        verified = chart.run_helm(*verify, major=major)
        assert verified.returncode == 0, verified.stderr
        assert NAME in verified.stdout + verified.stderr
    package.write_bytes(package.read_bytes() + b"\0")
    assert chart.run_helm(*verify).returncode != 0
