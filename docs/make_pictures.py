"""Takes the pictures of README from the demo's output: `python docs/make_pictures.py DEMO FOLDER`.

Headless Chromium shows the page of a server with the demo's models, asked a question that guidance
answers right and the base model wrong, and the demo's report; each in light and in dark.
"""

import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image

from tests.serve.chromium import Browser, chromium
from tita.data import read_questions
from tita.demo.models import demo_model_path
from tita.storage import open_store

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, COLOURS = 1000, 606, 128


def make_pictures(demo: Path, folder: Path) -> None:
    """Write `page-light.png`, `page-dark.png`, `report-light.png` and `report-dark.png`.

    Args:
        demo: output of `tita demo`.
    """
    reward, weight = reward_model(demo)
    image, question = corrected_question(demo, reward, weight=weight)
    folder.mkdir(parents=True, exist_ok=True)
    with serving(reward, weight=weight) as address, chromium() as browser:
        # The first answers take longer, and their times are shown.
        ask(browser, address, image=image, question=question)
        for theme in ("light", "dark"):
            set_window(browser, theme=theme)
            ask(browser, address, image=image, question=question)
            take(browser, folder / f"page-{theme}.png")
            browser.call("POST", "/url", {"url": (demo / "report.html").resolve().as_uri()})
            take(browser, folder / f"report-{theme}.png")


def reward_model(demo: Path) -> tuple[Path, float]:
    """The reward model that the demo chose, and its weight."""
    report = json.loads((demo / "report.json").read_text(encoding="utf-8"))
    verdict = report["verdict"]
    run = report["facts"][f"{verdict['pairs']}, run"]
    store = open_store(str(demo / "store"))
    return store.pull_tree(f"runs/{run}") / "model", float(verdict["weight"])


def corrected_question(demo: Path, reward: Path, *, weight: float) -> tuple[Path, str]:
    """Image and text of a held-out question that only the guided model answers as its reference."""
    data = demo / "store" / "data"
    questions = list(read_questions(data / "test.jsonl"))[:300]
    given = {str(each.id): each for each in questions}
    answers = demo / "answers-for-pictures.jsonl"
    answers.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "tita", "infer", "--base", demo_model_path("base"),
        "--reward", reward, "--weight", weight,
        "--questions", data / "test.jsonl", "--images", data, "--out", answers,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True)
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = given.get(str(row["question_id"]))
        if question and row["num_changed"] and row["text"] in question.references:
            return next(data.rglob(Path(str(question.image)).name)), question.text
    raise SystemExit(f"{demo}: guidance corrects none of {len(questions)} questions")


@contextmanager
def serving(reward: Path, *, weight: float) -> Iterator[str]:
    """The address of a server with the demo's base model and a reward model."""
    command = [
        sys.executable, "-m", "tita", "serve", "--port=0", f"--weight={weight}",
        f"--base={demo_model_path('base')}", f"--reward={reward}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    address = ""
    for line in process.stderr:
        if found := re.search(r"listening on (\S+)", line):
            address = found[1]
        if line.rstrip().endswith("ready"):
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield address if address.startswith("http") else f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def set_window(browser: Browser, *, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.cdp("Emulation.setEmulatedMedia", {"features": features})
    size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1}
    browser.cdp("Emulation.setDeviceMetricsOverride", size | {"mobile": False})
    browser.cdp("Emulation.setScrollbarsHidden", {"hidden": True})


def ask(browser: Browser, address: str, *, image: Path, question: str) -> None:
    """Ask the page a question about an image, and wait for both answers."""
    browser.call("POST", "/url", {"url": address})
    browser.call("POST", browser.find("#file") + "/value", {"text": str(image.resolve())})
    browser.until("!document.getElementById('preview').hidden")
    browser.run("document.getElementById('question').value = ''")
    browser.write("#question", question)
    browser.call("POST", browser.find("#ask") + "/click", {})
    browser.until("document.body.dataset.state === 'done'")


def take(browser: Browser, path: Path) -> None:
    """Save what the window shows, with few colours, because every clone downloads it."""
    shown = PIL.Image.open(io.BytesIO(base64.b64decode(browser.call("GET", "/screenshot"))))
    shown.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} kB", file=sys.stderr)


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]), Path(sys.argv[2]))
