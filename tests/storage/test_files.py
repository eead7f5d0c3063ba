"""Atomic writes."""

from pathlib import Path

import pytest

from tita.storage.files import atomic_path


def test_atomic_path_replaces_the_file_only_without_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
            assert path.exists() == (content == "new")
        assert path.read_text() == content

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
