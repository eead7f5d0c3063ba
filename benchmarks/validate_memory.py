"""Measures the memory of `tita data validate` in bytes per line.

Compares the peak resident memory of two processes, with 200,000 and 1,000,000 lines of different
ids, so that interpreter and libraries cancel out. Linux. Run: python benchmarks/validate_memory.py
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from shared.verdicts import finish, verdict

FEW, MANY = 200_000, 1_000_000
MAX_BYTES_A_LINE = 24
NUM_IMAGES = 50


def write(path: Path, *, num_lines: int) -> None:
    """Pairs and, every fifth line, a question."""
    with path.open("w") as file:
        for number in range(num_lines):
            image = f"images/{number % NUM_IMAGES}.png"
            row = {"id": f"pair-{number}", "image_id": image, "question": "What is written here?"}
            if number % 5:
                row |= {"chosen": f"the number {number}", "reject": "nothing at all"}
            file.write(json.dumps(row) + "\n")


def measure(path: Path) -> None:
    """Validate in this process, and print its peak resident memory in bytes."""
    from tita.data.validate import ValidationSummary, validate_dataset

    summary = ValidationSummary()
    for error in validate_dataset(path, images=path.parent, summary=summary):
        raise SystemExit(str(error))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(summary.num_pairs + summary.num_questions, peak)


def main() -> None:
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="tita-validate-") as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for number in range(NUM_IMAGES):
            Image.new("RGB", (8, 8)).save(folder / "images" / f"{number}.png")
        for num_lines in (FEW, MANY):
            write(folder / "data.jsonl", num_lines=num_lines)
            command = [sys.executable, __file__, str(folder / "data.jsonl")]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seen, peak = map(int, output.split())
            assert seen == num_lines
            peaks[num_lines] = peak
            print(f"{num_lines:>9,} lines: peak {peak / 2**20:.1f} MiB")
    grown = (peaks[MANY] - peaks[FEW]) / (MANY - FEW)
    verdict("bytes of memory a line", grown, at_most=MAX_BYTES_A_LINE)
    finish()


if __name__ == "__main__":
    measure(Path(sys.argv[1])) if sys.argv[1:] else main()
