"""A mistake in a run's inputs is one line and exit code 2, before any training."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from tita.demo.models import demo_model_path
from tita.errors import ExitCode, TitaError
from tita.recipes import TrainRecipe, validate_recipe
from tita.records import read_stages
from tita.storage import open_store
from tita.train.__main__ import report_error
from tita.train.training_data import cache_rows, read_inputs


def broken_pairs(tmp_path: Path, data: Any) -> dict[str, object]:
    path = tmp_path / "pairs.jsonl"
    path.write_text(data.pairs.read_text() + "{\n")
    return {"pairs": str(path)}


def missing_image(tmp_path: Path, data: Any) -> dict[str, object]:
    return {"images": str(tmp_path)}


def no_model(tmp_path: Path, data: Any) -> dict[str, object]:
    return {"model": str(tmp_path)}


def torn_model(tmp_path: Path, data: Any) -> dict[str, object]:
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_text("{")
    return {"model": str(tmp_path)}


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (broken_pairs, "pairs.jsonl:49: not JSON"),
        (missing_image, "no such image"),
        (no_model, "no config.json in it"),
    ],
)
def test_mistakes_are_reported_before_training(
    data: Any, tmp_path: Path, mistake: Callable[[Path, Any], dict[str, object]], words: str
) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "input").mkdir()
    inputs = {"pairs": str(data.pairs), "images": str(data.images)}
    reward = {"model": str(demo_model_path("reward"))}
    recipe = validate_recipe(TrainRecipe, reward | inputs | mistake(tmp_path / "input", data))
    with pytest.raises(TitaError) as caught:
        read_inputs(recipe, store=store)
    assert words in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_the_first_process_reports_a_missing_image(data: Any, tmp_path: Path) -> None:
    own = {"model": "m", "pairs": str(data.pairs), "images": str(tmp_path)}
    with pytest.raises(TitaError, match="no such image"):
        cache_rows(validate_recipe(TrainRecipe, own), store=open_store(str(tmp_path / "store")))


class _Removed(Dataset[None]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> None:
        raise TitaError("no such image", where="a.png", remedy="check the path")


def test_an_error_of_a_data_loader_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TitaError) as caught:
        next(iter(DataLoader(_Removed(), num_workers=1)))
    assert "Traceback" in str(caught.value)
    assert report_error(caught.value, recipe=None) == ExitCode.USER
    assert capsys.readouterr().err == "train-dpo: a.png: no such image; check the path\n"


@pytest.mark.slow
def write_nothing() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_nothing() -> None:
    # As save_file writes it, which would replace /dev/full.
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda: torch.save({"a": torch.zeros(1 << 20)}, "/dev/full"),
        lambda: torch.save({"a": 1}, "/dev/full"),
        write_nothing,
        save_nothing,
    ],
)
def test_a_full_disk_is_one_line_and_counted(
    write: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The next pod may have more space. torch's own message is about positions in a file."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        write()
    assert report_error(caught.value, recipe=None) == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "train-dpo: rank 0: the disk is full, and a checkpoint cannot be written"
    )


def test_an_unreadable_model_is_one_line_and_writes_nothing(
    start: Callable[..., Any], data: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (tmp_path / "input").mkdir()
    ended = start(store, **torn_model(tmp_path / "input", data)).finish()
    assert ended.code == 2, ended.text
    assert "that transformers can load" in ended.text
    errors = [line for line in ended.text.splitlines() if not read_stages(line)]
    assert len(errors) == 1, "reported once, by one of two ranks"
    assert not (store / "runs").exists()
