"""Overhead of `tita-bench run`: 1,000 questions, 64 in flight, at an endpoint with 500 ms latency.

The ideal time is ceil(1000 / 64) rounds of 500 ms. One `httpx.AsyncClient` for all requests,
without parsing, retries and results file, is measured beside it; its pool looks at all connections
for each request, which `tita-bench` avoids with a client per request in flight. The growth of peak
memory is that of 5,000 questions over 1,000. On a busy machine give the script priority, for
example with `chrt -r 1`.
"""

import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVER = Path(__file__).parent.parent / "tests" / "bench" / "scripted_endpoint.py"
NUM, CONCURRENCY, ANSWER_S = 1000, 64, 0.5
RATIO, MORE_MIB = 1.055, 50


def ask(port: int, *, num: int, folder: Path) -> tuple[float, float]:
    """Run `tita-bench run` as a function in a new process: (wall time in s, peak memory in MiB)."""
    code = f"""
import json, resource
from pathlib import Path
from tita.bench.registry import ModelEndpoint, RegisteredModel
from tita.bench.tasks import BenchmarkTask, run_endpoint
from tita.bench.load_shape import ClientOptions
folder = Path({str(folder)!r})
task = BenchmarkTask(questions=folder / 'q{num}.jsonl', images=folder, out=folder / 'r{num}.jsonl')
endpoint = ModelEndpoint(
    name='m', model=RegisteredModel(id='m'), base_url='http://127.0.0.1:{port}/v1'
)
stats = run_endpoint(task, endpoint, options=ClientOptions(concurrency={CONCURRENCY}))
assert (stats.num_asked, stats.num_failed) == ({num}, 0), stats
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([stats.wall_s, peak]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall_s, peak_mib = json.loads(done.stdout)
    return wall_s, peak_mib


async def bare(port: int, *, num: int) -> float:
    """Send the same requests with httpx only; returns the wall time in s."""
    import httpx

    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    queue = iter(range(num))
    started = time.perf_counter()
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:

        async def work() -> None:
            for _ in queue:
                url = f"http://127.0.0.1:{port}/v1/chat/completions"
                (await client.post(url, json=body)).raise_for_status()

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return time.perf_counter() - started


def main() -> int:
    server = subprocess.Popen(
        [sys.executable, str(SERVER), "--delay", str(ANSWER_S)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for num in (NUM, 5 * NUM):
                lines = (
                    json.dumps({"question_id": f"q{n}", "text": f"Question {n}?"}) + "\n"
                    for n in range(num)
                )
                (folder / f"q{num}.jsonl").write_text("".join(lines))
            plain = asyncio.run(bare(port, num=NUM))
            wall_s, peak = ask(port, num=NUM, folder=folder)
            long_s, long_peak = ask(port, num=5 * NUM, folder=folder)
    finally:
        server.kill()
        server.wait()
    ideal = math.ceil(NUM / CONCURRENCY) * ANSWER_S
    long_ideal = math.ceil(5 * NUM / CONCURRENCY) * ANSWER_S
    print(f"ideal {ideal:.2f} s, plain httpx {plain:.2f} s ({plain / ideal:.3f})")
    print(f"1,000 questions {wall_s:.2f} s, ratio {wall_s / ideal:.3f} (at most {RATIO})")
    print(f"5,000 questions {long_s:.2f} s, ratio {long_s / long_ideal:.3f}")
    print(f"peak memory {peak:.0f} and {long_peak:.0f} MiB (at most {MORE_MIB} MiB apart)")
    good = wall_s / ideal <= RATIO and long_peak - peak <= MORE_MIB
    print("ok" if good else "over the bound")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
