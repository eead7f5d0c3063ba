"""aiperf's recipe for answers of fixed length (`min_tokens` and `ignore_eos`) against `tita serve`.

    python benchmarks/clients/run_aiperf.py [--keep FOLDER]

The command is that of aiperf's tutorial on vLLM; only the URL, the model and the tokenizer differ.
"""

import json
from pathlib import Path

from demo_server import Unmodified, main
from other_clients import client_venv, run

from tita.demo.models import demo_model_path

PROMPT_TOKENS, ANSWER_TOKENS, NUM, WARM_UP = 100, 200, 64, 1


def check(base_url: str, folder: Path) -> dict[str, float]:
    run(
        [
            client_venv("aiperf") / "aiperf", "profile", "--model", "tita",
            "--tokenizer", demo_model_path("base"), "--endpoint-type", "chat",
            "--endpoint", "/v1/chat/completions", "--streaming",
            "--url", base_url.removesuffix("/v1"),
            "--synthetic-input-tokens-mean", PROMPT_TOKENS, "--synthetic-input-tokens-stddev", 0,
            "--output-tokens-mean", ANSWER_TOKENS, "--output-tokens-stddev", 0,
            "--extra-inputs", f"min_tokens:{ANSWER_TOKENS}", "--extra-inputs", "ignore_eos:true",
            "--concurrency", 4, "--request-count", NUM, "--warmup-request-count", WARM_UP,
            "--num-dataset-entries", 8, "--random-seed", 100,
            "--artifact-dir", folder / "aiperf", "--ui", "none",
        ]
    )  # fmt: skip
    found = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    names = (
        "request_count", "error_request_count", "output_sequence_length", "input_sequence_length",
        "time_to_first_token", "inter_token_latency", "request_throughput",
    )  # fmt: skip
    figures = {name: found[name]["avg"] for name in names if found.get(name)}
    assert figures["request_count"] == NUM, figures
    assert not figures.get("error_request_count"), figures
    return figures


if __name__ == "__main__":
    main(Unmodified(check=check, outcomes={"length": NUM + WARM_UP}, context=4096))
