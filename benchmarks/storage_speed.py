"""Compares push and pull of trees in S3 with `aws s3 cp --recursive`: duration and memory.

Both clients run as commands, in turns, with the same files and one SeaweedFS server: 2 GiB in 64
files, and 10,000 files of 20 KiB. Unlike awscli, tita verifies a SHA-256 of every file on push and
pull. awscli is installed in its own environment under .cache because its pins differ.
`storage_speed.py [--small] [--rounds 1]` exits with 1 if a bound is missed.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from shared.verdicts import finish, verdict

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from s3_server import BUCKET, KEYS, seaweedfs  # noqa: E402

AWSCLI = ROOT / ".cache" / "awscli"
MIB = 1 << 20
MEMORY_MIB = 300


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Number and size of the files."""

    name: str
    num_files: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and peak resident memory of one command."""

    seconds: float
    cpu_s: float
    memory_mib: float


FULL = (
    Shape(name="64 files, 2 GiB", num_files=64, size_bytes=32 * MIB),
    Shape(name="10,000 files of 20 KiB", num_files=10_000, size_bytes=20 << 10),
)
SMALL = (
    Shape(name="8 files, 256 MiB", num_files=8, size_bytes=32 * MIB),
    Shape(name="1,000 files of 20 KiB", num_files=1_000, size_bytes=20 << 10),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer files: 256 MiB and 1,000")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    aws = awscli()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "server").mkdir()
        with seaweedfs(here / "server") as url:
            peak = max(
                measure(shape, here / "trees", url=url, aws=aws, rounds=arguments.rounds)
                for shape in (SMALL if arguments.small else FULL)
            )
    verdict("peak memory of tita, MiB", peak, at_most=MEMORY_MIB)
    finish()


def awscli() -> str:
    """Path of `aws`; its environment is created if it does not exist."""
    command = AWSCLI / "bin" / "aws"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(AWSCLI)], check=True)
        subprocess.run([str(AWSCLI / "bin" / "pip"), "install", "-q", "awscli"], check=True)
    return str(command)


def measure(shape: Shape, here: Path, *, url: str, aws: str, rounds: int) -> float:
    """Print the ratios for one shape and return the peak memory of tita, in MiB."""
    source = here / "source"
    make_files(source, shape)
    store = f"s3://{BUCKET}/{shape.num_files}"
    env = {
        **os.environ, **KEYS, "TITA_S3_ENDPOINT_URL": url, "TITA_S3_REGION": "us-east-1",
        "TITA_S3_PATH_STYLE": "true", "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    runs: dict[tuple[str, str], list[Cost]] = {}
    # Alternate the order, so that neither client always runs first.
    for number, client in enumerate(("tita", "aws", "aws", "tita") * rounds):
        tree, copy = f"{client}-{number}", here / "copy"
        push, pull = commands(client, aws=aws, store=store, tree=tree, source=source, copy=copy)
        runs.setdefault(("push", client), []).append(run(push, env=env))
        runs.setdefault(("pull", client), []).append(run(pull, env=env))
        check(source, copy)
        shutil.rmtree(copy)
    for way in ("push", "pull"):
        mine, other = (
            statistics.mean(one.seconds for one in runs[way, client]) for client in ("tita", "aws")
        )
        cpu = [statistics.mean(r.cpu_s for r in runs[way, client]) for client in ("tita", "aws")]
        print(
            f"{way} of {shape.name}: tita {mine:.1f} s, aws {other:.1f} s; "
            f"CPU time {cpu[0]:.1f} s and {cpu[1]:.1f} s"
        )
        verdict(f"{way} of {shape.name}, speed beside aws", other / mine, at_least=1.0)
    shutil.rmtree(here)
    return max(
        one.memory_mib for (_, client), some in runs.items() for one in some if client == "tita"
    )


def commands(
    client: str, *, aws: str, store: str, tree: str, source: Path, copy: Path
) -> tuple[list[str], list[str]]:
    """The push and pull commands of a client."""
    if client == "tita":
        tita = [str(Path(sys.executable).with_name("tita")), "data"]
        return (
            [*tita, "push", str(source), tree, "--store", store],
            [*tita, "pull", tree, str(copy), "--store", store],
        )
    cp = [aws, "s3", "cp", "--quiet", "--recursive"]
    return [*cp, str(source), f"{store}/{tree}"], [*cp, f"{store}/{tree}", str(copy)]


def make_files(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True)
    for number in range(shape.num_files):
        content = random.Random(number).randbytes(shape.size_bytes)
        (folder / f"{number:05}.bin").write_bytes(content)


def run(command: list[str], *, env: dict[str, str]) -> Cost:
    """Run one command and wait for it."""
    # Otherwise the command may wait for earlier writes.
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return Cost(
        seconds=seconds,
        cpu_s=usage.ru_utime + usage.ru_stime,
        memory_mib=usage.ru_maxrss / 1024,
    )


def check(source: Path, copy: Path) -> None:
    """Compare each pulled file with the pushed one."""
    for path in source.iterdir():
        if (copy / path.name).read_bytes() != path.read_bytes():
            raise SystemExit(f"{copy / path.name} differs from what was pushed")


if __name__ == "__main__":
    main()
