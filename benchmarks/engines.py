"""The transformers engine, the vLLM engine, and vLLM alone, on the same models and prompts.

Random LLaVA weights, about 600 prompt tokens, 1, 8 and 32 concurrent answers. Each engine has a
process of its own. vLLM alone runs its own class of the base, and of the reward model. Needs vLLM
(`make install-vllm`, or a GPU machine with `pip install 'tita[vllm]'`). Run:
.venv-vllm/bin/python benchmarks/engines.py
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from shared.verdicts import finish, verdict

SYSTEMS = ("transformers", "vllm", "stock-base", "stock-reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", default="1,8,32", help="Concurrent answers, by commas.")
    parser.add_argument("--tokens", type=int, default=32, help="Tokens per answer.")
    parser.add_argument("--eager", action="store_true", help="Do not compile vLLM's models.")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    streams = [int(number) for number in given.streams.split(",")]
    if given.system:
        print(json.dumps(run(given.system, given.folder, streams, given.tokens, given.eager)))
        return
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed; run make install-vllm")
        return
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        found = {}
        for system in SYSTEMS:
            done = subprocess.run(
                [*command, "--system", system], stdout=subprocess.PIPE, text=True, check=True
            )
            found[system] = json.loads(done.stdout.splitlines()[-1])
            for row in found[system]:
                print(system, *(f"{name} {value:g}" for name, value in row.items()), flush=True)
    for place, number in enumerate(streams):
        spent = {system: rows[place]["processor_s"] for system, rows in found.items()}
        base, reward, guided = spent["stock-base"], spent["stock-reward"], spent["vllm"]
        ratios = (f"{guided / spent[other]:.2f} of {other}" for other in SYSTEMS if other != "vllm")
        print(f"{number} answers, vllm's processor time:", ", ".join(ratios))
        what = f"{number} answers: guided vLLM's processor time over that of both models alone"
        verdict(what, guided / (base + reward), at_most=1.15)
    finish()


def save_models(folder: Path) -> None:
    from tita.selftest.random_llava import BASE, REWARD, random_llava

    for seed, (role, size) in enumerate((("base", BASE), ("reward", REWARD))):
        vlm = random_llava(role, size, seed=seed)
        vlm.model.save_pretrained(folder / role)
        vlm.processor.save_pretrained(folder / role)


def run(
    system: str, folder: Path, streams: list[int], num_tokens: int, eager: bool
) -> list[dict[str, float]]:
    """One row of figures for each number of concurrent answers."""
    from tita.engine.engine_options import VllmOptions
    from tita.selftest.random_llava import question

    paths = {role: str(folder / role) for role in ("base", "reward")}
    options = VllmOptions(
        max_batch=max(streams),
        prefix_cache=False,
        compile=not eager,
        processes=False,
        max_model_len=1024,
        kv_cache_bytes=None if has_gpu() else 4 * 2**30,
    )
    engine = start(system, paths, options)
    weight = 0.5 if system in ("transformers", "vllm") else 0.0

    def answer(number: int, length: int) -> tuple[list[float], float, float]:
        """First token times, seconds, and processor seconds."""
        requests = [question(n, weight=weight, num_tokens=length) for n in range(number)]
        prepared = [engine.preparer.prepare(request) for request in requests]
        first: dict[object, float] = {}
        began, cpu_began = time.perf_counter(), time.process_time()
        for key, each in enumerate(prepared):
            engine.admit(key, each)
        while len(engine):
            for key, outcome in engine.step():
                if isinstance(outcome, Exception):
                    raise outcome
                first.setdefault(key, time.perf_counter() - began)
        took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        return list(first.values()), took_s, cpu_s

    answer(1, 2)
    rows = []
    for number in streams:
        first, took_s, cpu_s = answer(number, num_tokens)
        rows.append(
            {
                "answers": number,
                "tokens_per_s": number * num_tokens / took_s,
                "first_token_s": statistics.median(first),
                "processor_s": cpu_s,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    return rows


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def start(system: str, paths: dict[str, str], options: Any) -> Any:
    """The engine, as `tita.engine.interface.StepEngine`; its options are `VllmOptions`."""
    from tita.align.engine import Engine
    from tita.engine.transformers_batch import TransformersBatch
    from tita.engine.vllm_engine import load_outlines, start_vllm
    from tita.vllm_plugin.outline import models_of
    from tita.vlm.loading import load_vlm

    if system == "transformers":
        models = models_of({role: load_vlm(path) for role, path in paths.items()})
        return TransformersBatch(Engine(models), max_batch=options.max_batch)
    if system == "vllm":
        return start_vllm(load_outlines(paths), options)
    from shared.stock_vllm import StockVllm

    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return StockVllm(paths[system.removeprefix("stock-")], options)


if __name__ == "__main__":
    main()
