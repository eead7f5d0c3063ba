"""The nightly job with an S3 server: read questions, publish and fetch a report."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tita.bench.results_file import read_results


def run(*arguments: Any, env: dict[str, str]) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_questions_report_and_results_in_s3(
    s3_environment: dict[str, str], endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    env = s3_environment
    folder = tmp_path / "set"
    folder.mkdir()
    ask_file("say:x; one", "say:y; two", references=["x"], metric="exact").rename(
        folder / "questions.jsonl"
    )
    push = "from pathlib import Path; from tita.storage import open_store; import sys;"
    run("-c", push + "open_store().push_tree(Path(sys.argv[1]), 'data/set')", folder, env=env)
    recipe = {"base_url": endpoint.base_url, "questions": "data/set", "weights": [0.0, 0.3]}
    run(
        "-m",
        "tita.bench",
        env={**env, "TITA_RECIPE": json.dumps(recipe), "TITA_RUN": "night-1"},
    )
    (entry,) = json.loads(run("-m", "tita", "reports", "list", "-o", "json", env=env))
    assert [score["score"] for score in entry["scores"]] == [50, 50]
    assert entry["good"] is True
    fetched = tmp_path / "fetched"
    run("-m", "tita", "reports", "fetch", "latest", "--into", fetched, env=env)
    assert (fetched / "report.html").stat().st_size > 1000
    assert len(list(read_results(fetched / "tita_w0.3.jsonl"))) == 2
    page = run("-m", "tita", "reports", "open", "--no-browser", env=env).strip()
    assert Path(page).read_bytes() == (fetched / "report.html").read_bytes()
    # Where it is counted and evicted.
    assert Path(page).parent.parent.name == "trees"
