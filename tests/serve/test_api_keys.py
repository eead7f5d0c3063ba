"""API keys: parsing, and reloading when a mounted Secret is rotated."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import hosted
from serve_process import about, picture

from tita.align import Guidance
from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.api_keys import APIKeys, load_api_keys
from tita.serve.model_loading import LoadedModels
from tita.serve.serve_options import LoadOptions


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
    return [each.getMessage() for each in caplog.records if each.name == "tita.serve.api_keys"]


def test_a_rotated_secret_applies_to_the_next_request(
    models: LoadedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    secret = Secret(tmp_path, "old-key")
    caplog.set_level(logging.INFO, logger="tita.serve.api_keys")
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
    assert all(keys.find(key) == {} for key in (b"one", b"two", b"four"))
    assert all(keys.find(key) is None for key in (b"three", b"", b"one, two", b"#"))
    assert not APIKeys().required
    assert "one" not in repr(keys)


def test_a_key_has_default_weights(
    models: LoadedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Of requests that give none; a request's own weights, and those of other keys, stay."""
    path = tmp_path / "keys"
    path.write_text("plain-key\nbold-key reward=0.9, base-key reward=0\n")
    load = LoadOptions(base="base", reward="reward")
    options = ServeOptions(keys=load_api_keys(path, check=load.check_weights))
    caplog.set_level(logging.INFO, logger="tita.serve.api_keys")
    with hosted(models, options) as client:

        def weights(key: str, **fields: object) -> tuple[dict | None, float, str]:
            """The default weights on the model's card; those of a response, by its first token."""
            client.headers["authorization"] = f"Bearer {key}"
            card = client.get("/v1/models").json()["data"][0]
            body = {
                "model": "tita", "messages": about(picture("blue"), "is there a 7 ?"),
                "max_tokens": 1, "ignore_eos": True, "explain": True, **fields,
            }  # fmt: skip
            response = client.post("/v1/chat/completions", json=body)
            assert response.headers["x-tita-model-digest"] == card["digest"]
            [token, *_] = response.json()["choices"][0]["explain"]
            return card["guidance_weights"], token["combined"], card["digest"]

        plain, bold, alone = map(weights, ("plain-key", "bold-key", "base-key"))
        assert [each[0] for each in (plain, bold, alone)] == [None, {"reward": 0.9}, {"reward": 0}]
        assert len({each[2] for each in (plain, bold, alone)}) == 3
        for key, own in (("plain-key", 0.3), ("bold-key", 0.9), ("base-key", 0.0)):
            for other in ("plain-key", "bold-key"):
                _, found, _ = weights(other, guidance_weight=own)
                assert found == pytest.approx(weights(key)[1], abs=1e-4)
        # A name that the server does not have is one line in the log, and changes nothing.
        path.write_text("plain-key\nbold-key polite=0.9\n")
        assert weights("bold-key")[0] == {"reward": 0.9}
        path.write_text("bold-key reward=0.2\n")
        assert weights("bold-key")[0] == {"reward": 0.2}
    assert log_lines(caplog) == [
        f"{path}, line 2: no reward model 'polite'; the previous API keys stay valid",
        f"{path}: reloaded, 1 API keys",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a-key\n# c\nb-key polite=0.1", "line 3: no reward model 'polite'; choose from brief"),
        ("a-key brief=x", "line 1: the weight of brief is x; give a number from 0 to 100"),
        ("a-key brief=1 brief=2", "line 1: two weights of brief; leave one of them"),
        ("a-key brief=1 fast", "line 1: what follows a key is not NAME=WEIGHT; write KEY NAME="),
        ("a-key brief=1\na-key", "line 2: the key of line 1 again, with other weights; leave one"),
    ],
)
def test_wrong_weights_of_a_key_are_refused_at_startup(tmp_path: Path, text: str, message: str):
    (tmp_path / "keys").write_text(text)
    check = LoadOptions(base="base", rewards={"brief": "x"}).check_weights
    with pytest.raises(TitaError) as caught:
        load_api_keys(tmp_path / "keys", check=check)
    assert message in str(caught.value)
    assert "-key" not in str(caught.value)


def test_a_form_without_rewards_has_no_weights_by_key(tmp_path: Path):
    (tmp_path / "keys").write_text("a-key brief=0.1")
    load = LoadOptions(base="base", rewards={"brief": "x"}, guidance=Guidance(form="vcd"))
    with pytest.raises(TitaError, match="line 1: form vcd uses no reward model"):
        load_api_keys(tmp_path / "keys", check=load.check_weights)
