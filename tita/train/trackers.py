"""Experiment trackers: a run appears in each of `report_to`, and goes on there after a restart.

transformers' callbacks send the figures. The tracked runs are opened here, before the weights are
loaded, so that a wrong key or address is one line, and a resumed run finds its tracked run.
"""

import hashlib
import importlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from tita.errors import Preempted, TitaError
from tita.recipes import Tracker
from tita.settings import settings
from tita.storage.locate import trackers_key
from tita.terminal import say
from tita.train.checkpoints import retry_store
from tita.train.group import from_rank_0, on_all_ranks
from tita.train.run import TrainRun

Link = dict[str, str]
"""`url` of a tracked run, `id` if its tracker has one."""

PROJECT = "tita"
"""Of tracked runs, if the environment names none."""
_CLOSE_TIMEOUT_S = 60.0
"""Weights & Biases waits far longer for a server that is gone, before it gives up its figures."""
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN")
_CREDENTIALS = re.compile(r"://[^/@\s]+@")


@contextmanager
def tracked_runs(run: TrainRun) -> Iterator[Sequence[Tracker]]:
    """Open the run's tracked runs on rank 0, and close them at the end; every rank calls this.

    Their links are in the store at once, for `tita runs show`. A restarted run goes on without a
    tracker that was reached at an earlier start and cannot be opened now.

    Yields:
        The trackers that get the figures of this start.

    Raises:
        TitaError: a tracker cannot be reached or refuses the run.
    """
    if not run.recipe.report_to:
        yield ()
        return
    names = from_rank_0(lambda: _open(run))
    try:
        yield names
    except Preempted:
        on_all_ranks(partial(_close, names, "stopped"))
        raise
    except BaseException:
        # Other ranks may be gone.
        _close(names, "failed")
        raise
    on_all_ranks(partial(_close, names, "finished"))


def _open(run: TrainRun) -> list[Tracker]:
    key = trackers_key(run.out)
    known = _known_links(run, key=key)
    # Also those that this start does not report to: a later one may.
    links = dict(known)
    opened: list[Tracker] = []
    for name in run.recipe.report_to:
        try:
            links[name] = _OPEN[name](run, known.get(name, {}))
        except MemoryError:
            raise
        except Exception as error:
            # Every tracker has its own errors.
            what = f"cannot open the tracked run ({_reason(error)})"
            if isinstance(error, TitaError):
                what = error.what
            if name in known:
                # Key and address were right: a run of days does not end with its tracker.
                say(f"train-dpo: warning: {name}: {what}; it gets no figures of this start")
                continue
            if isinstance(error, TitaError):
                raise
            raise TitaError(
                what,
                where=name,
                remedy="check its key and address in the environment, or remove it from report_to",
            ) from None
        opened.append(name)
        say(f"train-dpo: tracked by {name}: {links[name]['url']}")
    record = {"launch": settings().launch_uid, "trackers": links}
    retry_store(lambda: run.store.put(key, json.dumps(record).encode()))
    return opened


def guard_trackers(trainer: Any) -> None:
    """Let a tracker fail during training, with a warning; it then gets no more figures."""
    names = trainer.args.report_to
    kinds = get_reporting_integration_callbacks(names)
    for callback in trainer.callback_handler.callbacks:
        for name, kind in zip(names, kinds, strict=True):
            if isinstance(callback, kind):
                _guard(callback, name)


def _guard(callback: TrainerCallback, name: str) -> None:
    failed = False

    def guarded(handle: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handle)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return handle(*args, **kwargs)
            except MemoryError:
                raise
            except Exception as error:
                # Of any type, as above.
                failed = True
                say(
                    f"train-dpo: warning: {name}: {_reason(error)}; it gets no more figures of "
                    "this start"
                )
                return None

        return call

    for event in (each for each in dir(callback) if each.startswith("on_")):
        setattr(callback, event, guarded(getattr(callback, event)))


def _close(names: Sequence[Tracker], state: str) -> None:
    for name in names if dist.get_rank() == 0 else ():
        try:
            if name in _CLOSE:
                _CLOSE[name](state)
        except Exception as error:
            # Of any type, as above. How the run ends does not depend on a tracker.
            say(f"train-dpo: {name}: cannot close the tracked run ({_reason(error)})")


def _call_in_time(work: Callable[[], Any]) -> None:
    """Call `work`, and leave it to a thread if it takes too long.

    Raises:
        TimeoutError: it does.
    """
    failures: list[Exception] = []

    def call() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="tracker", daemon=True)
    thread.start()
    thread.join(_CLOSE_TIMEOUT_S)
    if thread.is_alive():
        raise TimeoutError(f"no answer for {_CLOSE_TIMEOUT_S:g} s")
    if failures:
        raise failures[0]


def _reason(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return hide_secrets(first_line)[:300]


def _known_links(run: TrainRun, *, key: str) -> Mapping[str, Link]:
    """The links of an earlier start of this run: the same launch, or one that left checkpoints."""
    if not run.store.exists(key):
        return {}
    record = json.loads(run.store.get(key))
    launch = settings().launch_uid
    is_same_launch = launch is not None and record["launch"] == launch
    if is_same_launch or any(True for _ in run.store.list(f"{run.out}/checkpoints/")):
        found: dict[str, Link] = record["trackers"]
        return found
    return {}


def hide_secrets(text: str) -> str:
    """The text without keys of the environment, and without passwords in URLs."""
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return _CREDENTIALS.sub("://***@", text)


def _open_tensorboard(run: TrainRun, _: Link) -> Link:
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if folder is None:
        if "://" in run.store.uri:
            raise TitaError(
                "no TENSORBOARD_LOGGING_DIR, and the store is no folder",
                where="tensorboard",
                remedy="set it to a folder that outlives the pod; `run.json`'s folder has "
                "TensorBoard files at the end in any case",
            )
        folder = str(Path(run.store.uri).absolute() / "tensorboard" / run.out)
        os.environ["TENSORBOARD_LOGGING_DIR"] = folder
    if "://" not in folder:
        # Its callback opens it after the weights are loaded.
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"1")
    return {"url": folder}


def _open_wandb(run: TrainRun, known: Link) -> Link:
    wandb = importlib.import_module("wandb")
    # A new tracked run has an id that no other run of this project has.
    new = hashlib.sha256(os.urandom(16)).hexdigest()[:12]
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=known.get("id", new),
        resume="allow",
        # Standard output has the progress lines that the launcher reads.
        settings=wandb.Settings(silent=True, console="off"),
    )
    # Offline runs have a folder, which `wandb sync` uploads.
    url = Path(opened.dir).parent if opened.offline else opened.url
    return {"id": str(opened.id), "url": str(url)}


def _close_wandb(state: str) -> None:
    wandb = importlib.import_module("wandb")
    _call_in_time(lambda: wandb.finish(exit_code=int(state != "finished")))


def _open_mlflow(run: TrainRun, known: Link) -> Link:
    address = os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise TitaError(
            "no MLFLOW_TRACKING_URI in the environment",
            where="mlflow",
            remedy="set it to the server's URL; on a cluster in `jobs.trackers.existingSecret`",
        )
    # By default an unreachable server is asked for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # At the end it would print the address as it is, with a password.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(address)
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    opened = mlflow.start_run(run_id=known.get("id"), run_name=run.name).info
    page = f"/#/experiments/{opened.experiment_id}/runs/{opened.run_id}"
    url = address.rstrip("/") + page if address.startswith("http") else address
    return {"id": opened.run_id, "url": _CREDENTIALS.sub("://", url)}


def _close_mlflow(state: str) -> None:
    mlflow = importlib.import_module("mlflow")
    _call_in_time(mlflow.flush_async_logging)
    status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[state]
    mlflow.end_run(status)


def _open_trackio(run: TrainRun, _: Link) -> Link:
    # transformers' callback opens it again by its name, after the weights are loaded.
    importlib.import_module("trackio").init(project=PROJECT, name=run.name, resume="allow")
    space = os.environ.get("TRACKIO_SPACE_ID")
    return {"url": f"https://huggingface.co/spaces/{space}" if space else f"trackio: {run.name}"}


def _close_trackio(_: str) -> None:
    trackio = importlib.import_module("trackio")
    # transformers' callback closes it at the end of training.
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


_OPEN: Mapping[Tracker, Callable[[TrainRun, Link], Link]] = {
    "mlflow": _open_mlflow,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
    "wandb": _open_wandb,
}
_CLOSE: Mapping[Tracker, Callable[[str], Any]] = {
    "mlflow": _close_mlflow,
    "trackio": _close_trackio,
    "wandb": _close_wandb,
}
