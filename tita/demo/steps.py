"""Steps that demo and experiments share: data, pairs and training, whose results are reused.

Pairs and DPO are the ordinary jobs. The results of jobs are named by a digest of their inputs.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita import __version__
from tita.demo.rewards import RewardConfig
from tita.demo.scenes import Scene, Split, write_scenes
from tita.errors import ExitCode, JobFailed
from tita.launch.display import progress_line, stages_line
from tita.launch.local import run_node_processes
from tita.records import RunStages, read_record
from tita.storage import Store
from tita.storage.manifest import build_manifest
from tita.terminal import progress, say


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedReward:
    """A trained reward model, and the trees in the store that it comes from."""

    name: str
    model: Path
    pairs: str
    run: str


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Report the start of a step and its duration."""
    say(f"== {step}")
    started = time.monotonic()
    yield
    say(f"== {step}: {time.monotonic() - started:.1f} s")


def make_data(
    make_scenes: Callable[[Split, int], Sequence[Scene]],
    *,
    scenes: Mapping[Split, int],
    seed: int,
    tree: str,
    store: Store,
) -> str:
    """Write the scenes of all splits to the store unless they are there; the digest of the tree.

    Args:
        make_scenes: makes a number of scenes of a split.
        scenes: number of scenes by split.
        seed: of the scenes, for the tree's meta data.
        tree: name of the tree.
        store: where it is.
    """
    meta = {"scenes": dict(scenes), "seed": seed, "tita": __version__}
    manifest = store.read_manifest(tree)
    if manifest is not None and dict(manifest.meta) == meta:
        say(f"{tree}: already exists")
        return manifest.digest
    with tempfile.TemporaryDirectory(prefix="tita-demo-", ignore_cleanup_errors=True) as scratch:
        with progress("scenes", total=sum(scenes.values())) as advance:
            for split, number in scenes.items():
                write_scenes(Path(scratch), make_scenes(split, number), name=split)
                advance(number)
        return store.push_tree(Path(scratch), tree, meta=meta).digest


def train_reward(
    config: RewardConfig,
    *,
    base: Path,
    reward: Path,
    data: str,
    seed: int,
    store: Store,
    processes: int = 2,
    pairs_seed: int | None = None,
) -> TrainedReward:
    """Build pairs with the base model, and train the reward model on them.

    Args:
        config: the recipes.
        base: folder of the base model.
        reward: folder of the reward model before DPO.
        data: tree of the data.
        seed: of the training.
        store: where results are looked for and written.
        processes: per job.
        pairs_seed: of the pairs; that of the training if not given.

    Raises:
        JobFailed: a job ended without its result.
    """
    digests = {path.name: build_manifest(path).digest for path in (base, reward)}
    manifest = store.read_manifest(data)
    assert manifest is not None
    pairs_seed = seed if pairs_seed is None else pairs_seed
    key = hash_inputs(manifest.digest, digests[base.name], dict(config.pairs), pairs_seed)
    pairs = f"demo-pairs-{key}"
    run = f"demo-reward-{hash_inputs(pairs, digests[reward.name], dict(config.train), seed)}"
    asked = {"model": str(base), "questions": f"{data}/train.jsonl", "seed": pairs_seed}
    trained = {"model": str(reward), "pairs": f"pairs/{pairs}/pairs.jsonl", "seed": seed}
    for step, job, out, recipe in (
        ("pairs", "build-pairs", f"pairs/{pairs}", {**config.pairs, **asked}),
        ("DPO", "train-dpo", f"runs/{run}", {**config.train, **trained}),
    ):
        with timed(f"{step}: {config.name}"):
            own = {**recipe, "images": data}
            run_job(job, recipe=own, out=out, store=store, processes=processes)
    model = store.pull_tree(f"runs/{run}") / "model"
    return TrainedReward(name=config.name, model=model, pairs=pairs, run=run)


def hash_inputs(*parts: Any) -> str:
    """Eight hex digits of a step's inputs."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_job(job: str, *, recipe: Mapping[str, Any], out: str, store: Store, processes: int) -> None:
    """Run a job unless its result is there.

    Raises:
        JobFailed: it ended without a result.
    """
    if store.read_manifest(out) is not None:
        say(f"{job}: {out} already exists")
        return
    code = run_node_processes(
        job,
        recipe=recipe,
        run=out.split("/")[1],
        store=store.uri,
        procs_per_node=processes,
        on_line=_print_job_output,
    )
    if code:
        raise job_failed(job, code)


def job_failed(job: str, code: int) -> JobFailed:
    """The error of a process that ended without a result, with its exit code."""
    error = JobFailed(f"{job} ended with exit code {code}", remedy="see its output above")
    error.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED
    return error


def _print_job_output(rank: int, line: str) -> None:
    """Print a line of a job's output, records as text."""
    record = read_record(line)
    if record is None:
        say(f"  {line}")
    elif isinstance(record, RunStages):
        say(f"  {stages_line(record)}")
    else:
        say(f"  {progress_line(record)}")
