"""Do tita-bench, guidellm, aiperf and the rule of `vllm bench serve` measure the same?

Each measures a server whose times are known (`clients/timed_server.py`), for content, reasoning, a
late usage block and an early role event, then `tita serve` with the package's models. Figures are
medians over requests. On the server with known times all must agree with it within 3 %, except
where a rule differs by definition: `vllm bench serve` starts its clock at the first event with
`choices`, so an early role event starts it. On `tita serve` the figures are printed side by side;
guidellm and aiperf end their clock at the last text, tita-bench and vLLM at the finish reason.

    python benchmarks/client_parity.py [--only content,reasoning,late-usage,early-role,serve]

guidellm and aiperf run from environments of their own, see `clients/other_clients.py`.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "clients"))

from demo_server import tita_server
from other_clients import Figures, aiperf, guidellm, run
from timed_server import BETWEEN_S, FIRST_S, LATE_S, MODELS, PROMPT_TOKENS, TOKENS

from tita.demo.models import demo_model_path

NUM, CONCURRENCY, BOUND = 12, 2, 0.03
COMPARED = ("ttft", "ttfa", "itl", "tokens in", "tokens out")


def expected(model: str) -> Figures:
    """The known figures of the timed server."""
    answer_s = FIRST_S + (TOKENS // 2 * BETWEEN_S if model == "reasoning" else 0)
    return {
        "ttft": FIRST_S, "ttfa": answer_s, "itl": BETWEEN_S, "tokens in": PROMPT_TOKENS,
        "tokens out": TOKENS,
    }  # fmt: skip


def tita_bench(
    base_url: str, *, model: str, prompts: Path, out: Path, max_tokens: int, fixed: bool
) -> Figures:
    code = "from tita.cli.main import tita_bench; tita_bench()"
    folder = out / "tita-bench"
    folder.mkdir()
    run(
        [
            sys.executable, "-c", code, "run", "--questions", prompts, "--out",
            folder / "results.jsonl", "--model", model, "--base-url", base_url,
            "--concurrency", CONCURRENCY, "--max-new-tokens", max_tokens, "--warm-up", CONCURRENCY,
            *(["--ignore-eos"] if fixed else []),
        ]
    )  # fmt: skip
    run([sys.executable, "-c", code, "eval", "--dir", folder])
    (load,) = json.loads((folder / "report.json").read_text())["runs"][0]["loads"]
    names = {
        "ttft": "time_to_first_token", "ttfa": "time_to_first_answer_token",
        "itl": "time_per_output_token", "latency": "response_time",
        "tokens in": "input_tokens", "tokens out": "output_tokens",
    }  # fmt: skip
    # A time that no request has is left out: answers of one token have none between tokens.
    known = {figure: load[name]["p50"] for figure, name in names.items() if load[name]}
    return {"requests": load["complete"], **known}


def vllm_rule(base_url: str, *, model: str, prompts: Path, fields: dict[str, Any]) -> Figures:
    """The rule of `vllm bench serve` (vllm/benchmarks/lib/endpoint_request_func.py), over httpx.

    The first token is the first event with `choices`; the last one the last such event; the time
    per output token is between both, over the reported tokens - 1.
    """
    import httpx

    found: list[Figures] = []

    async def ask(client: httpx.AsyncClient, prompt: str) -> None:
        body = {
            "model": model, "messages": [{"role": "user", "content": prompt}], "stream": True,
            "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip
        started, first, last = time.perf_counter(), 0.0, 0.0
        usage: dict[str, Any] = {}
        async with client.stream("POST", f"{base_url}/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                data = json.loads(line.removeprefix("data: "))
                if data.get("choices"):
                    last = time.perf_counter() - started
                    first = first or last
                usage = data.get("usage") or usage
        num = usage["completion_tokens"]
        found.append(
            {
                "requests": 1.0, "ttft": first, "itl": (last - first) / max(1, num - 1),
                "latency": last, "tokens in": usage["prompt_tokens"], "tokens out": num,
            }
        )  # fmt: skip

    async def main() -> None:
        texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
        queue = iter(texts)
        async with httpx.AsyncClient(timeout=60) as client:

            async def work() -> None:
                for text in queue:
                    await ask(client, text)

            await asyncio.gather(*(work() for _ in range(CONCURRENCY)))

    asyncio.run(main())
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {**medians, "requests": float(len(found))}


@contextmanager
def timed_server() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).parent / "clients" / "timed_server.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


def measure(
    base_url: str, *, model: str, folder: Path, max_tokens: int, fixed: bool = False
) -> dict[str, Figures]:
    """The figures of each client on the same prompts; `fixed` asks for exactly `max_tokens`."""
    folder.mkdir()
    texts = [f"Question {number}: what is it?" for number in range(NUM)]
    prompts = folder / "prompts.jsonl"
    # `id` and `text` for tita-bench, `prompt` for guidellm, `text` for aiperf.
    rows = {
        "prompts": [{"prompt": text} for text in texts],
        "texts": [{"text": text} for text in texts],
        "questions": [{"question_id": f"q{n}", "text": t} for n, t in enumerate(texts)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    tokenizer = demo_model_path("base")
    common: dict[str, Any] = {
        "num": NUM,
        "concurrency": CONCURRENCY,
        "tokenizer": tokenizer,
        "out": folder,
    }
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
    if fixed:
        fields |= {"min_tokens": max_tokens, "ignore_eos": True}
    extra = [
        word
        for name, value in fields.items()
        for word in ("--extra-inputs", f"{name}:{json.dumps(value)}")
    ]
    return {
        "tita-bench": tita_bench(
            base_url, model=model, prompts=folder / "questions.jsonl", out=folder,
            max_tokens=max_tokens, fixed=fixed,
        ),
        "guidellm": guidellm(base_url, model=model, prompts=prompts, fields=fields, **common),
        "aiperf": aiperf(
            base_url, model=model, prompts=folder / "texts.jsonl", extra=extra, **common
        ),
        "vllm's rule": vllm_rule(base_url, model=model, prompts=prompts, fields=fields),
    }  # fmt: skip


def exempt(client: str, model: str, figure: str) -> bool:
    """Figures that a client defines in another way."""
    if client == "vllm's rule":
        return figure == "ttfa" or (model == "early-role" and figure in ("ttft", "itl"))
    return False


def report(title: str, found: dict[str, Figures], known: Figures | None, *, model: str) -> bool:
    """Print a table; returns whether all figures agree with the known ones."""
    print(f"\n{title}")
    print(f"  {'':12}" + "".join(f"{name:>14}" for name in COMPARED))
    if known:
        print(f"  {'known':12}" + "".join(f"{known[name]:14.4f}" for name in COMPARED))
    agree = True
    for client, figures in found.items():
        cells = []
        for name in COMPARED:
            value = figures.get(name)
            if value is None:
                cells.append(f"{'-':>14}")
                continue
            mark = ""
            if known and not exempt(client, model, name):
                off = abs(value / known[name] - 1) > BOUND
                agree, mark = agree and not off, "!" if off else ""
            cells.append(f"{value:.4f}{mark}".rjust(14))
        print(f"  {client:12}" + "".join(cells))
    return agree


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join((*MODELS, "serve")))
    parser.add_argument("--keep", type=Path, help="folder for the clients' reports")
    options = parser.parse_args()
    wanted = options.only.split(",")
    agree = True
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(exist_ok=True)
        with timed_server() as base_url:
            for model in (model for model in MODELS if model in wanted):
                found = measure(base_url, model=model, folder=folder / model, max_tokens=TOKENS)
                title = f"{model} (late usage by {LATE_S} s)" if model == "late-usage" else model
                agree &= report(title, found, expected(model), model=model)
        if "serve" in wanted:
            with tita_server(folder) as base_url:
                found = measure(
                    base_url, model="tita", folder=folder / "serve", max_tokens=16, fixed=True
                )
                report("tita serve, the package's models", found, None, model="serve")
    print("\nall agree within 3 %" if agree else "\nnot all agree within 3 % (marked !)")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
