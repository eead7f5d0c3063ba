"""API keys: parsing, and reloading when a mounted Secret is rotated."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import hosted

from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.middleware import APIKeys, load_api_keys
from tita.serve.model_loading import LoadedModels


class Secret:
    """A volume as the kubelet mounts it: files are links through `..data`, which it replaces."""

    def __init__(self, folder: Path, content: str) -> None:
        self._folder = folder
        self.path = folder / "api-keys"
        self.path.symlink_to("..data/api-keys")
        self._versions = 0
        self.write(content)

    def write(self, content: str) -> None:
        self._versions += 1
        version = self._folder / f"..version{self._versions}"
        version.mkdir()
        (version / "api-keys").write_text(content)
        (self._folder / "..data_tmp").symlink_to(version.name)
        os.rename(self._folder / "..data_tmp", self._folder / "..data")


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "tita.serve.middleware"]


def test_a_rotated_secret_applies_to_the_next_request(
    models: LoadedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    secret = Secret(tmp_path, "old-key")
    caplog.set_level(logging.INFO, logger="tita.serve.middleware")
    with hosted(models, ServeOptions(keys=load_api_keys(secret.path))) as client:

        def statuses(*keys: str) -> list[int]:
            sent = [{"authorization": f"Bearer {key}"} for key in keys]
            return [client.get("/v1/models", headers=each).status_code for each in sent]

        assert statuses("old-key", "new-key") == [200, 401]
        secret.write("# both, until all clients have the new key\nold-key,new-key\n")
        assert statuses("old-key", "new-key") == [200, 200]
        secret.write("new-key")
        assert statuses("old-key", "new-key", ",") == [401, 200, 401]
    assert log_lines(caplog) == [f"{secret.path}: reloaded, {number} API keys" for number in (2, 1)]


def emptied(path: Path) -> None:
    path.write_text("# none\n")


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("corrupt", [emptied, Path.unlink, not_utf8, directory])
def test_the_previous_keys_stay_valid_if_the_file_becomes_invalid(
    models: LoadedModels,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    corrupt: Callable[[Path], None],
):
    path = tmp_path / "keys"
    path.write_text("good-key\n")
    with hosted(models, ServeOptions(keys=load_api_keys(path))) as client:
        good, bad = ({"authorization": f"Bearer {key}"} for key in ("good-key", "bad-key"))
        corrupt(path)
        for _ in range(3):
            assert client.get("/v1/models", headers=good).status_code == 200
            assert client.get("/v1/models", headers=bad).status_code == 401
            assert client.get("/v1/models").status_code == 401
        [line] = log_lines(caplog)
        assert line.startswith(f"{path}: ")
        assert line.endswith("; the previous API keys stay valid")
        assert "-key" not in line
        # A corrected file is loaded again.
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_text("bad-key")
        assert client.get("/v1/models", headers=bad).status_code == 200
        assert client.get("/v1/models", headers=good).status_code == 401


def test_a_source_without_keys_is_an_error_at_startup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "keys"
    for corrupt in (lambda _: None, emptied, not_utf8):
        corrupt(path)
        with pytest.raises(TitaError) as caught:
            load_api_keys(path)
        assert str(path) in str(caught.value)
    monkeypatch.setenv("TITA_API_KEYS", " , ")
    with pytest.raises(TitaError, match="TITA_API_KEYS"):
        load_api_keys(None)


def test_keys_are_separated_by_newlines_or_commas(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("\ufeffone, two\n# three\n\n  four\n", encoding="utf-8")
    keys = load_api_keys(path)
    assert all(keys.contains(key) for key in (b"one", b"two", b"four"))
    assert not any(keys.contains(key) for key in (b"three", b"", b"one, two", b"#"))
    assert not APIKeys().required
    assert "one" not in repr(keys)
