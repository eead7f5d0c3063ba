"""The garbage collector pauses while large libraries are imported, and ignores their objects."""

import gc
from collections.abc import Iterator

import pytest

from tita.imports import without_garbage_collection


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_the_collector_runs_again_after_the_imports() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
        with without_garbage_collection():
            pass
        assert not gc.isenabled(), "the outer block has not ended"
        assert gc.get_freeze_count() == 0
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_an_import_that_fails_leaves_it_on() -> None:
    with pytest.raises(ImportError), without_garbage_collection():
        import tita.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
