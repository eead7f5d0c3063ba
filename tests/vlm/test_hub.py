"""A model that is to be downloaded while the hub does not answer."""

from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tita.errors import ExitCode, HubUnavailable, TitaError
from tita.vlm import loading
from tita.vlm.loading import load_vlm, translate_load_errors
from tita.vlm.model_set import digest_of


@pytest.mark.parametrize("use", [load_vlm, digest_of])
def test_a_model_outside_the_cache_is_named_offline(use: Callable[[str], Any]) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(TitaError, match=r"^a/none: not in the local cache.*name a folder$"):
        use("a/none")


def test_a_hub_that_does_not_answer_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    with (
        pytest.raises(HubUnavailable, match="does not answer; check the network"),
        translate_load_errors("a-user/a-model"),
    ):
        raise OSError("no connection") from LocalEntryNotFoundError("not in the cache")
    assert HubUnavailable.exit_code == ExitCode.RETRY
