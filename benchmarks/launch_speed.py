"""Cost of the launcher: start-up, time from Enter to the Job, and a watch of 256 pods.

Every figure is printed with its bound or with what it is compared to, from the same run. Of several
rounds the fastest counts: other programs only add time. CPU seconds are printed, too.
`launch_speed.py [--pods 256] [--seconds 20]` exits with 1 if a bound is missed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "launch"))

from fake_api import FakeApi  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
NODES = 256
FIGURES = {
    "loss": 0.5, "reward_margin": 0.2, "reward_accuracy": 0.75, "learning_rate": 1e-6,
    "samples_per_s": 3.0, "seconds_left": 20.0, "peak_memory_bytes": 1,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    api = FakeApi().start()
    good = [measure_start()]
    with tempfile.TemporaryDirectory() as folder:
        environment = prepare(api, Path(folder))
        good.append(measure_submit(api, environment))
        good.append(
            measure_watch(api, environment, num_pods=arguments.pods, seconds=arguments.seconds)
        )
    api.stop()
    return 0 if all(good) else 1


def measure_start(*, rounds: int = 15) -> bool:
    """`tita --help` against `import typer`, alternating, so that both see the same load."""
    tita = [str(Path(sys.executable).with_name("tita")), "--help"]
    typer = [sys.executable, "-c", "import typer"]
    times: dict[str, list[float]] = {"tita": [], "typer": []}
    for _ in range(rounds):
        times["typer"].append(seconds_of(typer))
        times["tita"].append(seconds_of(tita))
    help_s, import_s = (min(times[name]) for name in ("tita", "typer"))
    bound = 1.5 * import_s + 0.1
    print(
        f"start: tita --help {help_s * 1e3:.0f} ms, import typer {import_s * 1e3:.0f} ms, "
        f"ratio {help_s / import_s:.2f}; bound 1.5 x + 100 ms = {bound * 1e3:.0f} ms: "
        f"{verdict(help_s < bound)}"
    )
    return help_s < bound


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def prepare(api: FakeApi, folder: Path) -> dict[str, str]:
    """Puts the chart's templates into the API; an environment with its kubeconfig."""
    found = subprocess.run(
        [sys.executable, str(ROOT / "charts" / "get_helm.py"), "4"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    chart = ROOT / "charts" / "tita"
    values = str(chart / "ci" / "default-values.yaml")
    done = subprocess.run(
        [Path(found.stdout.strip()) / "helm", "template", "tita", str(chart), "--values", values],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    for item in yaml.safe_load_all(done.stdout):
        if item and item["kind"] == "CronJob":
            item["metadata"]["namespace"] = "lab"
            api.put("cronjobs.batch", item)
    api.put("serviceaccounts", {"metadata": {"name": "tita"}})
    for index in range(NODES):
        allocatable = {"nvidia.com/gpu": "8"}
        node = {"metadata": {"name": f"n{index}"}, "status": {"allocatable": allocatable}}
        api.put("nodes", node | {"spec": {}})
    config = folder / "kubeconfig"
    context = {"cluster": "c", "user": "u", "namespace": "lab"}
    entries = {
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": context}],
    }
    config.write_text(yaml.safe_dump(entries))
    return os.environ | {"KUBECONFIG": str(config)}


def measure_submit(api: FakeApi, environment: dict[str, str], *, rounds: int = 7) -> bool:
    """Time from Enter to the Job in the API, including all checks and the fake API's own time."""
    times = []
    spent_s = children_cpu_seconds()
    for number in range(rounds):
        created = threading.Event()
        api.on_job = lambda _, created=created: created.set()
        command = [sys.executable, "-m", "tita", "launch", "train-dpo", "--detach"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--name", f"bench-{number}"], env=environment, stderr=subprocess.DEVNULL
        )
        assert created.wait(60)
        times.append(time.perf_counter() - started)
        process.wait()
    api.on_job = None
    cpu_s = (children_cpu_seconds() - spent_s) / rounds
    good = min(times) < 1.0
    print(
        f"submit: from Enter to the Job {min(times):.2f} s (bound 1 s), "
        f"median {statistics.median(times):.2f} s; processor {cpu_s:.2f} s for the whole command: "
        f"{verdict(good)}"
    )
    return good


def measure_watch(
    api: FakeApi, environment: dict[str, str], *, num_pods: int, seconds: float
) -> bool:
    """CPU share and memory of a watch of a run with many pods that change and log."""
    subprocess.run(
        [sys.executable, "-m", "tita", "launch", "train-dpo", "--detach", "--no-preflight",
         "--nodes", str(num_pods), "--name", "big"],
        env=environment, check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pods = [api.pod("big", index, node=f"n{index}") for index in range(num_pods)]
    api.write(pods[0], *(f"line {number}" for number in range(100)))
    process = subprocess.Popen(
        [sys.executable, "-m", "tita", "jobs", "watch", "big"],
        env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(5)
    before, started, step = cpu_seconds(process.pid), time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step += 1
        api.run_pod(pods[step % num_pods], node="n0")
        api.write(pods[0], json.dumps({"progress": {"step": step, "steps": 10**6, **FIGURES}}))
        time.sleep(0.5)
    share = (cpu_seconds(process.pid) - before) / (time.perf_counter() - started)
    peak = peak_mib(process.pid)
    process.terminate()
    process.wait()
    print(
        f"watch: {num_pods} pods, {share:.1%} of one core (bound 5 %), {peak:.0f} MiB (bound 150): "
        f"{verdict(share < 0.05 and peak < 150)}"
    )
    return share < 0.05 and peak < 150


def verdict(good: bool) -> str:
    return "held" if good else "MISSED"


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux says VmHWM")


if __name__ == "__main__":
    sys.exit(main())
