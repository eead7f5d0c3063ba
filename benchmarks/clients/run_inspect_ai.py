"""An inspect_ai task with images and its provider `openai-api`, against `tita serve`.

    python benchmarks/clients/run_inspect_ai.py [--keep FOLDER]

Data set, solver, scorer and provider are inspect_ai's own; the samples are questions about the
package's scenes.
"""

import json
import os
from pathlib import Path

from demo_server import Unmodified, main, scene_rows
from other_clients import client_venv, run

NUM = 10
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def scenes():
    return Task(dataset=json_dataset("samples.jsonl"), solver=generate(), scorer=match())
"""


def write_task(folder: Path) -> int:
    """Write the task and its samples; returns their number."""
    rows = scene_rows(folder, num=NUM)
    samples = [
        {
            "id": row["question_id"],
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": row["image"]},
                        {"type": "text", "text": row["text"]},
                    ],
                }
            ],
            "target": row["answer"],
        }
        for row in rows
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(lines)
    (folder / "task.py").write_text(TASK)
    return len(samples)


def check(base_url: str, folder: Path) -> dict[str, float]:
    num = write_task(folder)
    run(
        [
            client_venv("inspect-ai") / "inspect", "eval", "task.py",
            "--model", "openai-api/local/tita", "--max-tokens", 8, "--temperature", 0,
            "--max-connections", 4, "--log-dir", "logs", "--log-format", "json",
            "--display", "none",
        ],
        cwd=folder,
        env={**os.environ, "LOCAL_BASE_URL": base_url, "LOCAL_API_KEY": "none"},
    )  # fmt: skip
    (log,) = (folder / "logs").glob("*.json")
    found = json.loads(log.read_text())
    assert found["status"] == "success", found.get("error")
    (score,) = found["results"]["scores"]
    assert found["results"]["completed_samples"] == num
    usage = next(iter(found["stats"]["model_usage"].values()))
    figures = {name: metric["value"] for name, metric in score["metrics"].items()}
    return figures | {"samples": num, "tokens in": usage["input_tokens"]}


if __name__ == "__main__":
    main(Unmodified(check=check, outcomes={}, context=None))
