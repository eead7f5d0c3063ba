"""Runs the demo: data, pairs, DPO, answers, report.

Pairs and DPO are the ordinary jobs; only data and models are small. The results of jobs are named
by a digest of their inputs, so that a second run reuses them.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita import __version__
from tita.align import Engine
from tita.data import read_questions
from tita.demo.demo_report import (
    method_table,
    summary_sentences,
    summary_table,
    to_json,
    write_page,
)
from tita.demo.experiment import BASELINES, CONDITIONS, Asked, DemoResult, analyse, ask
from tita.demo.models import demo_model_path
from tita.demo.scenes import Split, make_scenes, write_scenes
from tita.errors import ExitCode, JobFailed
from tita.launch.display import progress_line, stages_line
from tita.launch.local import run_node_processes
from tita.records import Question, RunStages, read_record
from tita.storage import Store, open_store
from tita.storage.directory import DirectoryStore
from tita.storage.manifest import build_manifest
from tita.terminal import emit, progress, say
from tita.vlm.loading import Models, load_vlm


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Number of scenes, with three questions each, by split, and the recipe of `train-dpo`."""

    scenes: Mapping[Split, int]
    train: Mapping[str, Any]


# SeVa's noise is too weak here: the large, bright digits of 32 pixels stay readable.
_PAIRS = {"dtype": "float32", "max_new_tokens": 8, "batch_size": 128, "noise": "ddpm"}
_TRAIN = {
    "dtype": "float32",
    "gradient_checkpointing": False,
    "freeze_vision": False,
    "learning_rate": 5e-4,
    "epochs": 2,
    "batch_size": 8,
    "max_length": 64,
}
FULL = DemoConfig(scenes={"train": 800, "validation": 200, "test": 400}, train=_TRAIN)
QUICK = DemoConfig(
    scenes={"train": 100, "validation": 30, "test": 60}, train={**_TRAIN, "max_steps": 10}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedReward:
    """The trained reward model and its data."""

    images: Path
    model: Path
    facts: dict[str, Any]


def run_demo(out: Path, *, config: DemoConfig, seed: int = 0) -> DemoResult:
    """Run all steps and write `report.json` and `report.html` to `out`.

    Args:
        out: folder for the store and the reports; finished steps in it are reused.
        config: size of the demo.
        seed: seed of data and training.

    Raises:
        TitaError: the folder cannot be written, or the input of a step is invalid.
        JobFailed: a job ended without its result.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    store = open_store(str(out / "store"))
    trained = _train_reward(config, store=store, seed=seed)
    with _timed("answers"):
        asked, questions = _answer_questions(trained, store=store)
    facts = trained.facts | {"seed": seed, "seconds": round(time.monotonic() - started, 1)}
    result = analyse(asked, questions, facts=facts)
    write_page(
        out / "report.html",
        result=result,
        questions=questions["test"],
        images=trained.images,
        answers={
            "base": asked["test", "base"].answers,
            "aligned": asked["test", result.guided.name].answers,
            "reward alone": asked["test", "reward model alone"].answers,
        },
    )
    DirectoryStore(out).put("report.json", to_json(result).encode())
    emit(summary_table(result))
    print("What it costs, what it brings:")
    emit(method_table(result))
    for sentence in summary_sentences(result.verdict):
        print(sentence)
    say(f"report: {out / 'report.html'}")
    return result


def _train_reward(config: DemoConfig, *, store: Store, seed: int) -> TrainedReward:
    """Make the data, build pairs with the base model, and train the reward model on them."""
    base, reward = demo_model_path("base"), demo_model_path("reward")
    with _timed("data"):
        data = _make_data(config, store=store, seed=seed)
    models = {"base": build_manifest(base).digest, "reward": build_manifest(reward).digest}
    pairs = f"demo-pairs-{_hash_inputs(data, models['base'], _PAIRS, seed)}"
    pairs_recipe = _PAIRS | {
        "model": str(base),
        "questions": "data/train.jsonl",
        "images": "data",
        "seed": seed,
    }
    with _timed("pairs"):
        _run_job("build-pairs", recipe=pairs_recipe, out=f"pairs/{pairs}", store=store)
    run = f"demo-reward-{_hash_inputs(pairs, models['reward'], config.train, seed)}"
    train_recipe = dict(config.train) | {
        "model": str(reward),
        "pairs": f"pairs/{pairs}/pairs.jsonl",
        "images": "data",
        "seed": seed,
    }
    with _timed("DPO"):
        _run_job("train-dpo", recipe=train_recipe, out=f"runs/{run}", store=store)
    return TrainedReward(
        images=store.pull_tree("data"),
        model=store.pull_tree(f"runs/{run}") / "model",
        facts={"tita": __version__, "data": data, "models": models, "pairs": pairs, "run": run},
    )


@contextmanager
def _timed(step: str) -> Iterator[None]:
    """Report the start of a step and its duration."""
    say(f"== {step}")
    started = time.monotonic()
    yield
    say(f"== {step}: {time.monotonic() - started:.1f} s")


def _hash_inputs(*parts: Any) -> str:
    """Eight hex digits of a step's inputs."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _make_data(config: DemoConfig, *, store: Store, seed: int) -> str:
    """Write the scenes to the store unless they are there; return the digest of the tree."""
    meta = {"scenes": dict(config.scenes), "seed": seed, "tita": __version__}
    manifest = store.read_manifest("data")
    if manifest is not None and dict(manifest.meta) == meta:
        say("data: already exists")
        return manifest.digest
    with tempfile.TemporaryDirectory(prefix="tita-demo-", ignore_cleanup_errors=True) as scratch:
        with progress("scenes", total=sum(config.scenes.values())) as advance:
            for split, number in config.scenes.items():
                scenes = make_scenes(split, number=number, seed=seed)
                write_scenes(Path(scratch), scenes, name=split)
                advance(number)
        return store.push_tree(Path(scratch), "data", meta=meta).digest


def _run_job(job: str, *, recipe: Mapping[str, Any], out: str, store: Store) -> None:
    if store.read_manifest(out) is not None:
        say(f"{job}: {out} already exists")
        return
    code = run_node_processes(
        job,
        recipe=recipe,
        run=out.split("/")[1],
        store=store.uri,
        procs_per_node=2,
        on_line=_print_job_output,
    )
    if code:
        error = JobFailed(f"{job} ended with exit code {code}", remedy="see its output above")
        error.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED
        raise error


def _print_job_output(rank: int, line: str) -> None:
    """Print a line of a job's output, records as text."""
    record = read_record(line)
    if record is None:
        say(f"  {line}")
    elif isinstance(record, RunStages):
        say(f"  {stages_line(record)}")
    else:
        say(f"  {progress_line(record)}")


def _answer_questions(
    trained: TrainedReward, *, store: Store
) -> tuple[dict[tuple[str, str], Asked], dict[str, list[Question]]]:
    """Answers by split and condition: all conditions on `test`, only guidance on `validation`."""
    questions = {
        split: list(read_questions(trained.images / f"{split}.jsonl"))
        for split in ("validation", "test")
    }
    base = load_vlm(str(demo_model_path("base")), store=store)
    reward = load_vlm(str(trained.model), store=store)
    untrained = load_vlm(str(demo_model_path("reward")), store=store)
    engines = {
        "trained": Engine(Models(base, reward)),
        "untrained": Engine(Models(base, untrained)),
        "reward alone": Engine(Models(reward, reward)),
    }
    tasks = [("validation", c) for c in CONDITIONS if c.is_guided]
    tasks += [("test", c) for c in (*CONDITIONS, *BASELINES)]
    answers: dict[tuple[str, str], Asked] = {}
    total = sum(len(questions[split]) for split, _ in tasks)
    with progress("answers", total=total) as advance:
        for split, condition in tasks:
            answers[split, condition.name] = ask(
                engines[condition.model],
                questions[split],
                images=trained.images,
                condition=condition,
                advance=advance,
            )
    return answers, questions
