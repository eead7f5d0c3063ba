"""Keys that change under a running server, as a rotated Secret of Kubernetes does."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import hosted

from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.loading import LoadedModels
from tita.serve.middleware import APIKeys, read_keys


class Secret:
    """A folder as the kubelet fills it: files are links through `..data`, which it swaps."""

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


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "tita.serve.middleware"]


def test_a_rotated_secret_counts_from_the_next_request(
    models: LoadedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    secret = Secret(tmp_path, "old-key")
    caplog.set_level(logging.INFO, logger="tita.serve.middleware")
    with hosted(models, ServeOptions(keys=read_keys(secret.path))) as client:

        def statuses(*keys: str) -> list[int]:
            sent = [{"authorization": f"Bearer {key}"} for key in keys]
            return [client.get("/v1/models", headers=each).status_code for each in sent]

        assert statuses("old-key", "new-key") == [200, 401]
        secret.write("# both, until all clients have the new one\nold-key,new-key\n")
        assert statuses("old-key", "new-key") == [200, 200]
        secret.write("new-key")
        assert statuses("old-key", "new-key", ",") == [401, 200, 401]
    assert told(caplog) == [
        f"{secret.path}: read again; API keys that are accepted: {number}" for number in (2, 1)
    ]


def emptied(path: Path) -> None:
    path.write_text("# none\n")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [emptied, Path.unlink, no_text, a_folder])
def test_a_spoilt_file_neither_opens_the_server_nor_ends_it(
    models: LoadedModels,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
):
    path = tmp_path / "keys"
    path.write_text("good-key\n")
    with hosted(models, ServeOptions(keys=read_keys(path))) as client:
        good, bad = ({"authorization": f"Bearer {key}"} for key in ("good-key", "bad-key"))
        spoil(path)
        for _ in range(3):
            assert client.get("/v1/models", headers=good).status_code == 200
            assert client.get("/v1/models", headers=bad).status_code == 401
            assert client.get("/v1/models").status_code == 401
        [line] = told(caplog)
        assert line.startswith(f"{path}: ")
        assert line.endswith("; the API keys stay as they were")
        assert "-key" not in line
        # And it is mended the same way.
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_text("bad-key")
        assert client.get("/v1/models", headers=bad).status_code == 200
        assert client.get("/v1/models", headers=good).status_code == 401


def test_a_server_does_not_begin_without_the_keys_that_it_was_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "keys"
    for spoil in (lambda _: None, emptied, no_text):
        spoil(path)
        with pytest.raises(TitaError) as caught:
            read_keys(path)
        assert str(path) in str(caught.value)
    monkeypatch.setenv("TITA_API_KEYS", " , ")
    with pytest.raises(TitaError, match="TITA_API_KEYS"):
        read_keys(None)


def test_keys_come_one_a_line_or_with_commas_between(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("\ufeffone, two\n# three\n\n  four\n", encoding="utf-8")
    keys = read_keys(path)
    assert all(keys.have(key) for key in (b"one", b"two", b"four"))
    assert not any(keys.have(key) for key in (b"three", b"", b"one, two", b"#"))
    assert not APIKeys().wanted
    assert "one" not in repr(keys)
