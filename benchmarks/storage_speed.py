"""Trees to and from S3 beside `aws s3 cp --recursive`, and the memory that takes.

Both clients push and pull the same files to and from one SeaweedFS server, in turns, as the whole
commands that people type: 2 GiB in 64 files, and 10,000 files of 20 KiB. tita checks a SHA-256 of
every file on both ways besides. awscli has pins of its own, so it gets an environment of its own
under .cache. `storage_speed.py [--small] [--rounds 1]` exits with 1 where a bound is missed.
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
    """So many files of so many bytes."""

    name: str
    num_files: int
    size_bytes: int


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
    parser.add_argument("--small", action="store_true", help="an eighth of it and less")
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
    """`aws` in an environment of its own, made if there is none."""
    command = AWSCLI / "bin" / "aws"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(AWSCLI)], check=True)
        subprocess.run([str(AWSCLI / "bin" / "pip"), "install", "-q", "awscli"], check=True)
    return str(command)


def measure(shape: Shape, here: Path, *, url: str, aws: str, rounds: int) -> float:
    """Print the ratios of one shape; the greatest memory that tita took, in MiB."""
    source = here / "source"
    make_files(source, shape)
    tita = str(Path(sys.executable).with_name("tita"))
    store = f"s3://{BUCKET}/{shape.num_files}"
    env = {
        **os.environ, **KEYS, "TITA_S3_ENDPOINT_URL": url, "TITA_S3_REGION": "us-east-1",
        "TITA_S3_PATH_STYLE": "true", "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1",
        "TITA_CACHE_DIR": str(here / "cache"),
    }  # fmt: skip
    times: dict[tuple[str, str], list[float]] = {}
    peak = 0.0
    for number in range(rounds):
        ours, theirs = f"tita-{number}", f"{store}/aws-{number}"
        runs = [
            ("push", "tita", [tita, "data", "push", str(source), ours, "--store", store]),
            ("push", "aws", [aws, "s3", "cp", "--quiet", "--recursive", str(source), theirs]),
            ("pull", "tita", [tita, "data", "pull", ours, str(here / "tita"), "--store", store]),
            ("pull", "aws", [aws, "s3", "cp", "--quiet", "--recursive", theirs, str(here / "aws")]),
        ]
        for way, client, command in runs if number % 2 == 0 else in_turn(runs):
            seconds, memory_mib = run(command, env=env)
            times.setdefault((way, client), []).append(seconds)
            if client == "tita":
                peak = max(peak, memory_mib)
        check(source, here / "tita")
        check(source, here / "aws")
        for name in ("tita", "aws"):
            shutil.rmtree(here / name)
    for way in ("push", "pull"):
        mine, other = (statistics.median(times[way, client]) for client in ("tita", "aws"))
        print(f"{way} of {shape.name}: tita {mine:.1f} s, aws {other:.1f} s")
        verdict(f"{way} of {shape.name}, speed beside aws", other / mine, at_least=1.0)
    print(f"memory at {shape.name}: {peak:.0f} MiB")
    shutil.rmtree(here)
    return peak


def in_turn(runs: list[tuple[str, str, list[str]]]) -> list[tuple[str, str, list[str]]]:
    """The other client first, either way."""
    return [runs[place] for place in (1, 0, 3, 2)]


def make_files(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True)
    for number in range(shape.num_files):
        content = random.Random(number).randbytes(shape.size_bytes)
        (folder / f"{number:05}.bin").write_bytes(content)


def run(command: list[str], *, env: dict[str, str]) -> tuple[float, float]:
    """Seconds, and the greatest resident memory in MiB, of one command."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def check(source: Path, copy: Path) -> None:
    """Every byte came back."""
    for path in source.iterdir():
        if (copy / path.name).read_bytes() != path.read_bytes():
            raise SystemExit(f"{copy / path.name} differs from what was pushed")


if __name__ == "__main__":
    main()
