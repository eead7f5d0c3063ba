"""Other clients of endpoints, in environments of their own; medians of two under our names.

Set GUIDELLM, AIPERF, LMMS_EVAL and INSPECT_AI to the folders of virtual environments that have
them, or let `client_venv` create them with pip below CLIENT_ENVS (default: ~/.cache/tita-clients).
Times are in seconds.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = {
    "guidellm": "guidellm==0.8.1",
    "aiperf": "aiperf==0.13.0",
    "lmms-eval": "lmms-eval==0.7.3 filelock==3.32.7",
    "inspect-ai": "inspect_ai==0.3.285 openai==3.57.0",
}
NEED_TORCH = ("guidellm", "lmms-eval")
TORCH = "torch==2.13.0"
"""Installed first: the build that PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS offers."""
Figures = dict[str, float]


def client_venv(name: str) -> Path:
    """The `bin` folder of the environment of a client; created if it is missing."""
    given = os.environ.get(name.upper().replace("-", "_"))
    envs = Path(os.environ.get("CLIENT_ENVS", "~/.cache/tita-clients")).expanduser()
    folder = Path(given) if given else envs / name
    if not (folder / "bin" / "python").exists():
        print(f"creating {folder} for {PACKAGES[name]}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        if name in NEED_TORCH:
            subprocess.run([*pip, "install", "--quiet", TORCH], check=True)
            subprocess.run([*pip, "install", "--quiet", TORCH, *PACKAGES[name].split()], check=True)
            # PyPI's torchvision is for CUDA, and cannot be imported beside a CPU build of torch.
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        else:
            subprocess.run([*pip, "install", "--quiet", *PACKAGES[name].split()], check=True)
    return folder / "bin"


def run(command: list[Any], **options: Any) -> str:
    """The output of a command; ends the program with its last lines if the command fails."""
    words = [str(word) for word in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def guidellm(
    base_url: str, *, model: str, prompts: Path, num: int, concurrency: int, tokenizer: Path,
    out: Path, fields: dict[str, Any] | None = None,
) -> Figures:  # fmt: skip
    """Figures of `guidellm run` with one prompt per line of `prompts` (field `prompt`)."""
    venv = client_venv("guidellm")
    backend = f"kind=openai_http,target={base_url.removesuffix('/v1')},model={model}"
    backend += ",request_format=/v1/chat/completions"
    for name, value in (fields or {}).items():
        backend += f",extras.body.{name}={json.dumps(value)}"
    report = out / "guidellm.json"
    run(
        [
            venv / "guidellm", "run", "--backend", backend,
            "--profile", f"kind=concurrent,streams={concurrency}",
            "--constraint", f"kind=max_requests,count={num}",
            "--tokenizer", f"kind=hf_auto,model={tokenizer}",
            "--data", f"kind=json_file,path={prompts}",
            "--output", f"kind=json,path={report}",
            "--output", f"kind=html,path={out}/guidellm.html",
            "--disable-console",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]

    def median(name: str) -> float:
        return float(metrics[name]["successful"]["median"])

    return {
        "requests": float(metrics["request_totals"]["successful"]),
        "ttft": median("time_to_first_token_ms") / 1000,
        "ttfa": median("time_to_first_output_token_ms") / 1000,
        "itl": median("inter_token_latency_ms") / 1000,
        "latency": median("request_latency"),
        "tokens in": median("prompt_token_count"),
        "tokens out": median("output_token_count"),
    }


def aiperf(
    base_url: str, *, model: str, prompts: Path, num: int, concurrency: int, tokenizer: Path,
    out: Path, extra: Sequence[str] = (),
) -> Figures:  # fmt: skip
    """Figures of `aiperf profile` with one prompt per line of `prompts` (field `text`)."""
    venv = client_venv("aiperf")
    run(
        [
            venv / "aiperf", "profile", "-m", model, "--url", base_url.removesuffix("/v1"),
            "--endpoint-type", "chat", "--streaming", "--tokenizer", tokenizer,
            "--input-file", prompts, "--custom-dataset-type", "single_turn",
            "--request-count", num, "--concurrency", concurrency, "--use-server-token-count",
            "--artifact-dir", out / "aiperf", "--ui", "none", *extra,
        ]
    )  # fmt: skip
    found = json.loads((out / "aiperf" / "profile_export_aiperf.json").read_text())

    def median(name: str) -> float:
        return float(found[name].get("p50", found[name]["avg"]))

    return {
        "requests": median("request_count"),
        "ttft": median("time_to_first_token") / 1000,
        "ttfa": median("time_to_first_output_token") / 1000,
        "itl": median("inter_token_latency") / 1000,
        "latency": median("request_latency") / 1000,
        "tokens in": median("input_sequence_length"),
        "tokens out": median("output_sequence_length"),
    }
