"""`make test-fast` runs the tests that are nearest to a change."""

import pytest

from tests.nearest import MAX_FILES, nearest


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("tita/serve/prepare_queue.py", "tests/serve/test_prepare_queue.py"),
        ("tests/bench/test_metrics.py", "tests/bench/test_metrics.py"),
        ("charts/tita/values.yaml", "tests/chart"),
        ("docs/serving.md", "tests/test_docs.py"),
    ],
)
def test_nearest_tests_of_one_change(changed: str, expected: str):
    found = nearest([changed])
    assert expected in found
    assert "tests/test_layers.py" in found
    assert "tests/storage/test_stores.py" not in found


def test_a_package_that_everything_imports_is_bounded():
    changed = ["tita/errors.py", "tita/records.py", "tita/recipes.py", "tests/data/test_hub.py"]
    found = nearest(changed)
    assert len(found) <= MAX_FILES + 1
