"""Peak memory of guided decoding: both models, both caches, and a batch of logits of each.

Random LLaVA weights, batch 8, about 600 prompt tokens, 96 new ones, Linux. The peak is measured
after the prefill, whose memory depends on the prompts' length alone. Run:
python benchmarks/guided_memory.py
"""

import ctypes
import os
import re
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from shared.verdicts import finish, verdict

from tita.align import Engine, EngineOptions
from tita.align.batch import Batch
from tita.selftest.random_llava import BASE, NUM_WORDS, REWARD, question, random_llava
from tita.vlm.loading import Models

BATCH, NUM_TOKENS = 8, 96


def resident_bytes(*, peak: bool) -> int:
    """Memory of this process: now, or the peak since `reset_peak`."""
    found = re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", _status())
    assert found
    return 1024 * int(found[1])


def _status() -> str:
    return Path("/proc/self/status").read_text()


def reset_peak() -> None:
    """Return free memory to the system, and reset the peak (proc(5), clear_refs)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def cache_bytes(batch: Batch) -> int:
    """Size of all keys and values, spare capacity included."""
    caches = [runner._cache for runner in batch.runners.values()]
    layers = [layer for cache in caches if cache is not None for layer in cache.layers]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def warm_up(engine: Engine) -> None:
    engine.generate([question(weight=0.5, num_tokens=4)])


def main() -> None:
    torch.set_num_threads(1)
    models = Models(random_llava("base", BASE, seed=0), random_llava("reward", REWARD, seed=1))
    # Memory of libraries and kernels is not measured here.
    warm_up(Engine(models, EngineOptions(pack=False)))
    reset_peak()
    bare = resident_bytes(peak=False)
    engine = Engine(models)
    warm_up(engine)
    reset_peak()
    packed = resident_bytes(peak=False)
    batch, preparer = engine.new_batch(), engine.preparer
    for n in range(BATCH):
        batch.admit(n, preparer.prepare(question(n, weight=0.5, num_tokens=NUM_TOKENS)))
    while len(batch.runners["base"].keys) < BATCH:
        batch.step()
    reset_peak()
    caches = 0
    while len(batch):
        caches = max(caches, cache_bytes(batch))
        batch.step()
    peak = resident_bytes(peak=True)
    logits = 2 * BATCH * NUM_WORDS * 4
    mib = {"models": bare, "packed": packed, "caches": caches, "logits": logits, "peak": peak}
    print(", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in mib.items()))
    verdict("peak over models, caches and logits", peak / (bare + caches + logits), at_most=1.05)
    finish()


if __name__ == "__main__":
    main()
