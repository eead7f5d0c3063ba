"""Settings of this process, read from the `TITA_*` environment variables.

The chart and `tita launch --local` set the same variables; a test compares the chart's names with
these. Hyperparameters are not settings: they are in `tita.recipes`.
"""

import difflib
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tita.errors import TitaError
from tita.terminal import say


class Settings(BaseSettings):
    """The `TITA_*` environment variables. S3 credentials come from the AWS credential chain."""

    model_config = SettingsConfigDict(env_prefix="TITA_", extra="ignore", frozen=True)

    store: str = "tita-store"
    """Store for data and results: `s3://bucket/prefix` or a directory."""
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_path_style: bool = False
    """Address buckets as `endpoint/bucket`, as most S3 servers other than AWS require."""
    s3_anonymous: bool = False
    """Send unsigned requests, for public buckets; credentials are ignored."""
    s3_encryption: Literal["", "AES256", "aws:kms", "aws:kms:dsse"] = ""
    """Server-side encryption that every write asks for. Empty: the bucket's default."""
    s3_kms_key_id: str | None = None
    """Id, ARN or alias of the KMS key for `s3_encryption`. None: the account's key for S3."""
    s3_requester_pays: bool = False
    """Accept the charges of requests to a bucket whose owner does not pay them."""
    cache_dir: Path = Path("~/.cache/tita")
    """Cache of downloaded files, addressed by digest. All jobs of a node may share it."""
    cache_max_gib: Annotated[float, Field(gt=0)] | None = None
    """Maximum size of the cache; the least recently used files are evicted. None: no limit."""
    cache_volume_gib: Annotated[float, Field(gt=0)] | None = None
    """Size limit of the volume with `cache_dir`, which the file system does not report: the kubelet
    evicts a pod whose emptyDir exceeds it. None: the disk's size."""
    lock_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A process that holds a lock of the store or the cache and makes no progress for this long is
    considered hung: those that wait for it fail."""
    scratch_dir: Path | None = None
    """Folder for the working files of a job; defaults to the system's temporary folder."""
    scratch_volume_gib: Annotated[float, Field(gt=0)] | None = None
    """The same for the volume with `scratch_dir`."""

    run: str | None = None
    """Id of this run; on a cluster, the name of the Job."""
    launch_uid: str | None = None
    """Id of this launch of the run; on a cluster, the uid of the Job."""
    tries: Annotated[int, Field(ge=0)] | None = None
    """Incidents after which the gang starts again; one more ends it. None: nothing is counted."""
    recipe: str | None = None
    """Overrides of the job's default recipe, as a JSON object."""
    num_nodes: Annotated[int, Field(ge=1)] = 1
    node_rank: Annotated[int, Field(ge=0)] = 0
    procs_per_node: Annotated[int, Field(ge=1)] = 1
    """Worker processes per node: one per GPU."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs that this pod holds; None outside a cluster."""
    allow_cpu: bool = False
    """Run on the CPU where the GPUs that this pod holds are not usable, instead of failing."""
    master_addr: str = "127.0.0.1"
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    release: str | None = None
    """Helm release that this process belongs to; recorded with its results."""
    namespace: str | None = None
    """Namespace of this pod; recorded with its results."""
    revision: str | None = None
    """Git revision of the image; recorded with its results."""
    rendezvous_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long the nodes of a gang wait for each other at the start."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A worker without a heartbeat for this long is frozen or lost: its node ends it, and other
    ranks stop waiting for it."""
    termination_log: Path | None = None
    """File for the termination message (JSON); on a cluster, /dev/termination-log."""

    api_keys: SecretStr | None = None
    """Bearer tokens that the inference server accepts, separated by commas."""
    registry: Path | None = None
    """Default of `tita-bench --registry`: a YAML file that extends the built-in models."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    debug: bool = False
    """Print tracebacks of errors that are otherwise reported in one line."""


@cache
def settings() -> Settings:
    """The settings of this process, read once; variables that look like one and are none are told.

    Raises:
        TitaError: a variable has an invalid value; the message does not contain the value.
    """
    for name, near in _misspelt_variables().items():
        say(f"tita: {name} is no setting and has no effect; did you mean {near}?")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = "TITA_" + "_".join(str(part) for part in first["loc"]).upper()
        # The rest may quote values, whose case counts.
        what = first["msg"][:1].lower() + first["msg"][1:]
        raise TitaError(what, where=name, remedy="correct or unset it") from None


def _misspelt_variables() -> dict[str, str]:
    """Environment variables that are no settings, and the setting whose name is nearly the same.

    Others may begin with `TITA_`, too, such as those of an API key that a recipe names.
    """
    known = {f"TITA_{name.upper()}" for name in Settings.model_fields} | {"TITA_API_KEY"}
    found = {}
    for name in sorted(os.environ):
        if name.startswith("TITA_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.82)
            if near:
                found[name] = near[0]
    return found
