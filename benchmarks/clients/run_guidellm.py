"""guidellm's default profile against `tita serve`: a sweep over rates, with fixed output lengths.

    python benchmarks/clients/run_guidellm.py [--keep FOLDER]

Profile, strategies and rates are guidellm's own; the time of each is limited to a few seconds. The
prompts are read from a file: guidellm's synthetic texts are hardly a token for the package's
tokenizer, which knows 60 words, so that generating them takes minutes. guidellm asks for the number
of tokens in `output_tokens_count` with `ignore_eos`.
"""

import json
from pathlib import Path

from demo_server import Unmodified, main
from other_clients import client_venv, run

from tita.demo.models import demo_model_path

SECONDS, ANSWER_TOKENS = 5, 32


def check(base_url: str, folder: Path) -> dict[str, float]:
    report, prompts = folder / "guidellm.json", folder / "prompts.jsonl"
    rows = (
        {"prompt": f"is there a {number % 10} ?", "output_tokens_count": ANSWER_TOKENS}
        for number in range(2000)
    )
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backend = f"kind=openai_http,target={base_url.removesuffix('/v1')}"
    # The package's models end most of these answers at once, and guidellm times texts only.
    backend += f",extras.body.min_tokens={ANSWER_TOKENS}"
    run(
        [
            client_venv("guidellm") / "guidellm", "run",
            "--backend", backend,
            "--profile", "kind=sweep",
            "--tokenizer", f"kind=hf_auto,model={demo_model_path('base')}",
            "--data", f"kind=json_file,path={prompts}",
            "--constraint", f"kind=max_duration,seconds={SECONDS}",
            "--output", f"kind=json,path={report}",
            "--output", f"kind=html,path={folder / 'guidellm.html'}",
            "--disable-console-interactive",
        ]
    )  # fmt: skip
    figures: dict[str, float] = {}
    for each in json.loads(report.read_text())["benchmarks"]:
        metrics = each["metrics"]
        name = each["config"]["strategy"]["type_"]
        totals = metrics["request_totals"]
        figures[f"{name} successful"] = totals["successful"] + figures.get(f"{name} successful", 0)
        figures["errored"] = figures.get("errored", 0) + totals["errored"]
        lengths = metrics["output_token_count"]["successful"]
        figures[f"{name} mean output tokens"] = lengths["mean"]
    assert not figures["errored"], figures
    return figures


if __name__ == "__main__":
    # The strategy `throughput` has 512 requests in flight, of which 429 would refuse most.
    main(Unmodified(check=check, outcomes={}, context=4096, options=("--max-waiting", "1024")))
