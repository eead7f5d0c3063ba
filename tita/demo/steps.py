"""The demo's first steps, the ordinary jobs: data, pairs, DPO.

What is special is only the data and the size. The results of jobs are named after a digest of all
that goes into them, so that a second run finds them.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tita import __version__
from tita.demo.models import demo_model_path
from tita.demo.plan import Plan
from tita.demo.scenes import Split, make_scenes, write_scenes
from tita.errors import ExitCode, JobFailed
from tita.launch.local import run_local
from tita.storage import Store
from tita.storage.manifest import describe
from tita.terminal import progress, say

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the first steps leave for the last ones."""

    images: Path
    run: str
    reward: Path
    facts: dict[str, Any]


def train_reward(plan: Plan, *, store: Store, seed: int) -> Trained:
    """Draw the data, build pairs with the base model, train the reward model on them."""
    base, reward = demo_model_path("base"), demo_model_path("reward")
    data = timed("data", lambda: _data(plan, store=store, seed=seed))
    models = {"base": describe(base).digest, "reward": describe(reward).digest}
    pairs_recipe = dict(plan.pairs) | {
        "model": str(base),
        "questions": "data/train.jsonl",
        "images": "data",
        "seed": seed,
    }
    pairs = f"demo-pairs-{_key(data, models['base'], plan.pairs, seed)}"
    timed("pairs", lambda: _job("build-pairs", recipe=pairs_recipe, run=pairs, store=store))
    train_recipe = dict(plan.train) | {
        "model": str(reward),
        "pairs": f"pairs/{pairs}/pairs.jsonl",
        "images": "data",
        "seed": seed,
    }
    run = f"demo-reward-{_key(pairs, models['reward'], plan.train, seed)}"
    timed("DPO", lambda: _job("train-dpo", recipe=train_recipe, run=run, store=store))
    facts = {"tita": __version__, "data": data, "models": models, "pairs": pairs, "run": run}
    return Trained(
        images=store.pull_tree("data"),
        run=run,
        reward=store.pull_tree(f"runs/{run}") / "model",
        facts=facts,
    )


def timed(name: str, work: Callable[[], T]) -> T:
    """Do one step of the demo, saying when it begins and how long it took."""
    say(f"== {name}")
    started = time.monotonic()
    result = work()
    say(f"== {name}: {time.monotonic() - started:.1f} s")
    return result


def _key(*parts: Any) -> str:
    """Eight hex digits that stand for everything that goes into a step."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _data(plan: Plan, *, store: Store, seed: int) -> str:
    """The digest of the data in the store, drawn anew if it is not what `plan` asks for."""
    numbers: dict[Split, int] = {
        "train": plan.num_train,
        "validation": plan.num_validation,
        "test": plan.num_test,
    }
    wanted = {"scenes": dict(numbers), "seed": seed, "tita": __version__}
    there = store.read_manifest("data")
    if there is not None and dict(there.meta) == wanted:
        say("data: there already")
        return there.digest
    folder = Path(tempfile.mkdtemp(prefix="tita-demo-"))
    try:
        with progress("scenes", total=sum(numbers.values())) as advance:
            for split, number in numbers.items():
                write_scenes(folder, make_scenes(split, number=number, seed=seed), name=split)
                advance(number)
        return store.push_tree(folder, "data", meta=wanted).digest
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(job: str, *, recipe: Mapping[str, Any], run: str, store: Store) -> None:
    folder = {"build-pairs": "pairs", "train-dpo": "runs"}[job]
    if store.read_manifest(f"{folder}/{run}") is not None:
        say(f"{job}: {folder}/{run} is there already")
        return
    code = run_local(
        job, recipe=recipe, run=run, store=store.uri, procs_per_node=2, on_line=_pass_on
    )
    if code:
        raise _failed(job, code)


def _failed(job: str, code: int) -> JobFailed:
    error = JobFailed(f"{job} ended with exit code {code}", remedy="the lines above say why")
    error.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED
    return error


def _pass_on(rank: int, line: str) -> None:
    """A job's output for people: progress in words, all else as it came."""
    try:
        told = json.loads(line)["progress"]
    except (ValueError, KeyError, TypeError):
        say(f"  {line}")
        return
    say(
        f"  step {told['step']}/{told['steps']}: loss {told['loss']:.3f}, "
        f"margin {told['reward_margin']:.2f}, accuracy {told['reward_accuracy']:.2f}, "
        f"{told['samples_per_s']:.0f} pairs/s, {told['seconds_left']:.0f} s left"
    )
