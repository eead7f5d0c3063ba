"""Processes that use one cache at the same time: `cache_race.py FOLDER CASE [TRIES]`.

They are forked from one process, so that they differ by microseconds. Every one that got its tree
keeps it until all others have theirs, as the ranks of a gang do; a line per try says how many did.
"""

import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tita.activity import mark_progress
from tita.errors import TitaError
from tita.storage.cache import TreeCache
from tita.storage.manifest import Manifest, build_manifest

FORK = get_context("fork")
PROCESSES, PATIENCE_S = 8, 60.0


def make_tree(folder: Path, **files: bytes) -> tuple[Manifest, Path]:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return build_manifest(folder), folder


def copier(source: Path, *, pause_s: float = 0.0) -> Callable[[Sequence[Any]], None]:
    def fetch(files: Sequence[Any]) -> None:
        for file, path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tita-{os.getpid()}")
            temporary.write_bytes((source / file.path).read_bytes())
            temporary.replace(path)
            time.sleep(pause_s)

    return fetch


def hold(root: Path, tree: tuple[Manifest, Path], *, pause_s: float = 0.0) -> None:
    manifest, source = tree
    check(TreeCache(root).hold(manifest, fetch=copier(source, pause_s=pause_s)), tree)


def check(held: Path, tree: tuple[Manifest, Path]) -> None:
    manifest, source = tree
    for file in manifest.files:
        assert (held / file.path).read_bytes() == (source / file.path).read_bytes()


def attempt(root: Path, trees: Sequence[tuple[Manifest, Path]], *, kill: bool = False) -> int:
    """Number of processes that got their tree while the others kept theirs.

    Pipes synchronise them: a process that is killed would keep a lock of `multiprocessing`.
    """
    start, got, over = os.pipe(), os.pipe(), os.pipe()

    def work(number: int) -> None:
        os.close(start[1])
        os.close(over[1])
        os.read(start[0], 1)
        hold(root, trees[number % len(trees)], pause_s=0.002 if kill else 0.0)
        os.write(got[1], bytes([number]))
        os.read(over[0], 1)

    workers = [FORK.Process(target=work, args=(number,)) for number in range(PROCESSES)]
    for worker in workers:
        worker.start()
    os.close(start[1])
    if kill:
        time.sleep(random.uniform(0.0, 0.06))
        workers[0].kill()
    found: set[int] = set()
    wanted = set(range(1 if kill else 0, PROCESSES))
    deadline = time.monotonic() + PATIENCE_S
    while not wanted <= found and time.monotonic() < deadline:
        if kill:
            TreeCache(root).prune(1 << 40)
        if select.select([got[0]], [], [], 0.005)[0]:
            found |= set(os.read(got[0], PROCESSES))
    for number in found & wanted:
        check(root / "trees" / trees[number % len(trees)][0].digest, trees[number % len(trees)])
    for worker in workers[: len(workers) if not wanted <= found else 0]:
        worker.kill()
    os.close(over[1])
    for worker in workers:
        worker.join()
    for descriptor in (start[0], *got, over[0]):
        os.close(descriptor)
    return len(found & wanted)


def main(folder: Path, case: str, tries: int = 1) -> None:
    shared = {str(number): bytes([number]) * 1000 for number in range(8)}
    one = make_tree(folder / "one", **shared, own=b"1")
    if case == "together":
        for number in range(tries):
            print(attempt(folder / f"cache-{number}", [one]), flush=True)
    elif case == "killed":
        other = make_tree(folder / "other", **shared, own=b"2")
        for number in range(tries):
            print(attempt(folder / f"cache-{number}", [one, other], kill=True), flush=True)
    else:
        root, started = folder / "cache", FORK.Event()

        def fetch(files: Sequence[Any]) -> None:
            started.set()
            if case == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            for _ in range(15):
                time.sleep(0.3)
                mark_progress()
            copier(one[1])(files)

        filler = FORK.Process(target=lambda: TreeCache(root).hold(one[0], fetch=fetch))
        filler.start()
        started.wait()
        print(filler.pid, flush=True)
        try:
            hold(root, one)
        except TitaError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        finally:
            filler.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
