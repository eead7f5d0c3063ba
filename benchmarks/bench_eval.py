"""`tita-bench eval` of a million result lines: seconds, peak memory, ratio to plain JSON parsing.

Parsing the same lines with `json.loads` in the same run shows the speed of this machine.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM = 1_000_000
LONGEST_S, MOST_MIB = 120.0, 1024.0
ANSWERS = ("Yes", "No", "yes, there is", "maybe", "a red dog", "42", "I can't tell")
METRICS = ("yes-no", "vqa", "exact", "anls")


def write(path: Path) -> None:
    """Write a million lines as `tita-bench run` does; a quarter of them has ten references."""
    draw = random.Random(0)
    ten = [[draw.choice(("red dog", "a cat", "42", "blue")) for _ in range(10)] for _ in range(997)]
    short = "Answer the question using a single word or phrase."
    with path.open("w") as file:
        for n in range(NUM):
            kind = n % 4
            success = n % 101 != 0
            record = {
                "question_id": f"q{n}", "model_name": "m",
                "prompt": f"Is there a thing {n % 977} in the image?\n{short}",
                "response": ANSWERS[n % 7], "input_tokens": 600, "output_tokens": 5,
                "total_tokens": 605, "response_time": draw.random(), "success": success,
                "error_message": None if success else "HTTP 500: overloaded",
                "time_to_first_token": 0.1, "time_per_output_token": 0.02,
                "finish_reason": "stop", "attempts": 1, "image": f"images/{n % 5000}.jpg",
                "metric": METRICS[kind], "suite": "s", "category": f"c{n % 7}",
                "references": (["yes"], ten[n % 997], ["no"], ["a red dog"])[kind],
                "weight": None, "questions_sha256": "ab" * 32, "max_new_tokens": 128,
                "temperature": 0.0,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "results.jsonl"
        write(path)
        started = time.perf_counter()
        with path.open("rb") as lines:
            num = sum(1 for line in lines if json.loads(line))
        plain = time.perf_counter() - started
        code = "import sys; from tita.cli.main import tita_bench; tita_bench(sys.argv[1:])"
        command = [sys.executable, "-c", code, "eval", "--dir", name]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        report = json.loads((Path(name) / "report.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert report["runs"][0]["num_questions"] == num == NUM
    print(f"json.loads alone {plain:.1f} s; eval {seconds:.1f} s, ratio {seconds / plain:.2f}")
    print(
        f"eval {seconds:.1f} s (at most {LONGEST_S:.0f}), {peak:.0f} MiB (at most {MOST_MIB:.0f})"
    )
    good = seconds <= LONGEST_S and peak <= MOST_MIB
    print("ok" if good else "over the bound")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
