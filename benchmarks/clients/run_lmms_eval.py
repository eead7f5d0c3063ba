"""lmms-eval's task POPE with its model `openai`, against `tita serve`.

    python benchmarks/clients/run_lmms_eval.py [--keep FOLDER]

Task and model are lmms-eval's own. Its data set is replaced by yes/no questions
about the package's scenes, which the package's models know: `datasets` finds a folder of this name
in the working directory before it asks the Hub.
"""

import json
import os
from pathlib import Path

from demo_server import Unmodified, main, scene_rows
from other_clients import client_venv, run

DATA_SET = "lmms-lab-encoder/POPE"
NUM = 40


def write_pope(folder: Path) -> int:
    """Write the data set in POPE's columns; returns the number of questions."""
    import datasets

    rows = [row for row in scene_rows(folder, num=NUM) if row["answer"] in ("yes", "no")]
    table = {
        "id": [str(n) for n in range(len(rows))],
        "question_id": [str(n) for n in range(len(rows))],
        "question": [row["text"] for row in rows],
        "answer": [row["answer"] for row in rows],
        "image_source": [row["image"] for row in rows],
        "image": [str(folder / row["image"]) for row in rows],
        "category": ["scenes"] * len(rows),
    }
    data = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    out = folder / DATA_SET / "data"
    out.mkdir(parents=True)
    data.to_parquet(str(out / "test-00000-of-00001.parquet"))
    return len(rows)


def check(base_url: str, folder: Path) -> dict[str, float]:
    num = write_pope(folder)
    output = run(
        [
            client_venv("lmms-eval") / "lmms-eval", "eval", "--model", "openai",
            "--model_args", f"model=tita,base_url={base_url},api_key=none,num_concurrent=4",
            "--tasks", "pope", "--batch_size", 1, "--log_samples", "--output_path", folder / "out",
        ],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
    )  # fmt: skip
    reports = list((folder / "out").rglob("*results.json"))
    assert reports, f"no report, although lmms-eval exits with 0:\n{output[-3000:]}"
    figures = json.loads(reports[0].read_text())["results"]["pope"]
    (samples,) = (folder / "out").rglob("*samples_pope.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert len(answers) == num, len(answers)
    assert not any("LMMS_EVAL_REQUEST_FAILED" in str(answer) for answer in answers)
    return {
        name.partition(",")[0]: value
        for name, value in figures.items()
        if isinstance(value, float) and "stderr" not in name
    } | {"questions": float(num)}


if __name__ == "__main__":
    main(Unmodified(check=check, outcomes={}, context=None))
