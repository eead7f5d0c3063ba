"""`tita serve` with the package's models, for clients that are run against it."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.demo.models import Role, copy_with_context, demo_model_path
from tita.demo.scenes import make_scenes, write_scenes


@contextmanager
def tita_server(
    folder: Path, *, context: int | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """The base URL of `tita serve` with the package's models; its log is in `folder`.

    Args:
        context: context length in tokens, beyond the models' own 64; answers are then meaningless,
            which clients that only measure times do not notice.
        options: further options of `tita serve`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    roles: tuple[Role, Role] = ("base", "reward")
    if context is None:
        models = {role: demo_model_path(role) for role in roles}
    else:
        models = copy_with_context(folder / "models", context=context)
    command = [
        sys.executable, "-m", "tita", "serve", "--base", str(models["base"]),
        "--reward", str(models["reward"]), "--port", "0", *options,
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        for _ in range(1200):
            found = log.read_text().partition("listening on ")[2].split(maxsplit=1)
            if found:
                try:
                    urllib.request.urlopen(f"{found[0]}/readyz", timeout=2).close()
                    break
                except OSError:
                    pass
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"{found[0]}/v1"
    finally:
        process.terminate()
        process.wait()


_ENDINGS = ("stop", "length", "abort", "499")
"""Endings that are no failure of the server: guidellm disconnects when its time is over."""


def server_counts(base_url: str) -> dict[str, int]:
    """Requests by outcome, and refusals by HTTP status, from the server's metrics."""
    url = f"{base_url.removesuffix('/v1')}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    pattern = r'^tita:(?:request|refused_requests)_total\{.*(?:outcome|code)="(.*?)".*\} (.*)$'
    found = re.findall(pattern, text, re.MULTILINE)
    return {name: int(float(count)) for name, count in found if float(count)}


def scene_rows(folder: Path, *, num: int) -> list[dict[str, Any]]:
    """Questions about scenes of the test split, whose images are written below `folder`."""
    write_scenes(folder, make_scenes("test", number=num), name="questions")
    lines = (folder / "questions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@dataclass(frozen=True, kw_only=True)
class Unmodified:
    """One client that is run against the server as it is."""

    check: Callable[[str, Path], Mapping[str, float]]
    """Runs the client on a base URL with a folder for its files; its figures."""
    outcomes: Mapping[str, int]
    """Requests by outcome that the server must have counted; empty: only that none failed."""
    options: Sequence[str] = ()
    """Further options of `tita serve`."""
    context: int | None
    """Context length of the models; None for their own."""


def main(client: Unmodified) -> None:
    """Run a client, print what came out and what the server counted; exit 1 if it failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="folder for the client's files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = (options.keep or Path(name)).absolute()
        with tita_server(folder, context=client.context, options=client.options) as base_url:
            figures = client.check(base_url, folder)
            counts = server_counts(base_url)
    for figure, value in figures.items():
        print(f"{figure:32} {value:.4g}")
    print(f"the server counted {counts}")
    failed = {name for name in counts if name not in _ENDINGS}
    good = not failed and all(counts.get(name) == num for name, num in client.outcomes.items())
    print("ok" if good else f"not as expected: {failed or dict(client.outcomes)}")
    sys.exit(0 if good else 1)
