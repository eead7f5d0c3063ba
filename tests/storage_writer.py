"""A process that pushes once, started fast: its module is loaded before it is forked."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from tita.errors import TitaError
from tita.storage import open_store
from tita.storage.s3_store import S3Store as S3Store  # loads boto3 before the fork

_FORKSERVER = multiprocessing.get_context("forkserver")


def start_push(store: str, folder: Path, name: str, *, env: dict[str, str]) -> BaseProcess:
    """A process that pushes a folder and exits with the exit code of the command."""
    _FORKSERVER.set_forkserver_preload(["tests.storage_writer"])
    process = _FORKSERVER.Process(target=_push, args=(store, folder, name, env), daemon=True)
    process.start()
    return process


def _push(store: str, folder: Path, name: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    try:
        open_store(store).push_tree(folder, name)
    except TitaError as error:
        sys.exit(int(error.exit_code))
