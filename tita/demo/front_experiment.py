"""Two reward models with opposed preferences, and the front that their weights trade along.

On the captions, one reward model prefers what a contrast says (*faithful*), the other prefers the
longer of the base's own samples (*complete*). `tita-bench sweep` asks with a grid of weights and
shows CHAIR_i against recall, as MRGD does with its two rewards (arXiv 2508.11616).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tita.align import Engine, Request, Sampling
from tita.align.forms import UNGUIDED
from tita.bench.questions import write_items
from tita.data import read_questions
from tita.demo.captions import caption_length
from tita.demo.rewards import RewardConfig
from tita.demo.scenes import Scene
from tita.demo.seeds import TaskRun
from tita.demo.steps import hash_inputs, job_failed, run_job, timed, train_reward
from tita.demo.tasks import Task
from tita.storage import Store
from tita.storage.manifest import build_manifest
from tita.suites.caption_sets import read_chair
from tita.terminal import progress, say
from tita.vlm.images import open_image
from tita.vlm.loading import Models

_GRID = (0.0, 0.1, 0.2, 0.3)
_NUM_SAMPLES = 4
_BATCH_SIZE = 64
_TITA_BENCH = "from tita.cli.main import tita_bench; tita_bench()"


def run_front(task: Task, faithful: RewardConfig, *, seed: int, store: Store, folder: Path) -> None:
    """Train both reward models and write the report of the sweep to `front/`.

    Args:
        task: the captions.
        faithful: recipes of the first reward model.
        seed: of both trainings.
        store: where results are looked for and written.
        folder: for models and the report.

    Raises:
        JobFailed: a job ended without its result.
    """
    run = TaskRun.start(task, store=store, folder=folder)
    first = train_reward(
        faithful, base=run.base, reward=run.reward, data=f"data-{task.name}", seed=seed,
        pairs_seed=0, store=store, processes=1,
    )  # fmt: skip
    base, reward = (build_manifest(path).digest for path in (run.base, run.reward))
    pairs = f"pairs/demo-complete-{hash_inputs(run.data, task.name, base)}"
    if store.read_manifest(pairs) is None:
        with timed("front: pairs of longer captions"):
            _build_pairs(run, pairs)
    second = f"runs/demo-reward-complete-{hash_inputs(pairs, reward, dict(task.train), seed)}"
    recipe = {
        "model": str(run.reward), "pairs": f"{pairs}/pairs.jsonl", "images": f"data-{task.name}",
        "seed": seed,
    }  # fmt: skip
    with timed("front: DPO"):
        run_job("train-dpo", recipe={**task.train, **recipe}, out=second, store=store, processes=1)
    questions = folder / "front" / "questions.jsonl"
    write_questions(questions, task.make_scenes("test", task.scenes["test"]))
    grid = [f"faithful={a:g}+complete={b:g}" for a in _GRID for b in _GRID if a or b]
    with timed("front: sweep"):
        _bench(
            "sweep", "--questions", str(questions), "--out", str(folder / "front"),
            "--images", str(store.pull_tree(f"data-{task.name}")),
            "--local-model", str(run.base), "--reward", f"faithful={first.model}",
            "--reward", f"complete={store.pull_tree(second) / 'model'}",
            "--methods", ",".join(["base", *grid]), "--front", "CHAIR_i,recall",
            "--max-new-tokens", str(task.max_new_tokens),
        )  # fmt: skip
    say(f"experiments: the front is in {folder / 'front'}")


def _build_pairs(run: TaskRun, tree: str) -> None:
    """Of several samples for each training image, the longest is preferred to the shortest."""
    folder = run.store.pull_tree(f"data-{run.task.name}")
    questions = list(read_questions(folder / "train.jsonl"))
    engine = Engine(Models(run.base_vlm))
    rows = []
    with progress("samples", total=len(questions)) as advance:
        for start in range(0, len(questions), _BATCH_SIZE):
            batch = questions[start : start + _BATCH_SIZE]
            images = [open_image(folder / str(each.image)) for each in batch]
            samples = [
                engine.generate(
                    [
                        Request(
                            question=question.text,
                            images=(image,),
                            guidance=UNGUIDED,
                            sampling=Sampling(
                                max_new_tokens=run.task.max_new_tokens, temperature=1.0, seed=seed
                            ),
                        )
                        for question, image in zip(batch, images, strict=True)
                    ]
                )
                for seed in range(_NUM_SAMPLES)
            ]
            for question, *outputs in zip(batch, *samples, strict=True):
                answers = sorted((each.text.strip() for each in outputs), key=caption_length)
                if caption_length(answers[0]) < caption_length(answers[-1]):
                    rows.append(
                        {
                            "id": question.id, "image_id": question.image,
                            "question": question.text, "chosen": answers[-1],
                            "reject": answers[0],
                        }
                    )  # fmt: skip
            advance(len(batch))
    with tempfile.TemporaryDirectory(prefix="tita-front-") as scratch:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (Path(scratch) / "pairs.jsonl").write_text(text)
        run.store.push_tree(Path(scratch), tree, meta={"pairs": len(rows)})


def write_questions(path: Path, scenes: Sequence[Scene]) -> None:
    """Write the questions of CHAIR about scenes, by its reader of COCO's files."""
    questions = {}
    boxes, captions, images = [], [], []
    for number, scene in enumerate(scenes, start=1):
        (question,) = scene.questions
        questions[str(number)] = question
        images.append({"id": number, "file_name": question.image})
        captions.append({"image_id": number, "caption": question.references[0]})
        boxes += [{"image_id": number, "category_id": digit.value} for digit in scene.digits]
    categories = [{"id": value, "name": str(value)} for value in range(10)]
    files = {
        "instances_test.json": {"images": images, "annotations": boxes, "categories": categories},
        "captions_test.json": {"annotations": captions},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tita-front-") as scratch:
        source = Path(scratch)
        for name, content in files.items():
            (source / name).write_text(json.dumps(content))
        (source / "synonyms.txt").write_text("".join(f"{value}\n" for value in range(10)))
        (source / "images.txt").write_text("".join(f"{number}\n" for number in questions))
        items = [
            # The models know one prompt for captions.
            replace(item, text=questions[item.id].text)
            for item in read_chair(source, out=path.parent)
        ]
    write_items(path, items)


def _bench(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-c", _TITA_BENCH, *arguments]).returncode
    if code:
        raise job_failed(f"tita-bench {arguments[0]}", code)
