"""Where this process runs: everything read from the `TITA_*` environment.

The chart writes these variables, `--local` writes the same ones, and a test holds the chart's
names and these together. Hyperparameters are no settings: they stand in recipes.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tita.errors import TitaError


class Settings(BaseSettings):
    """The `TITA_*` environment, typed. Credentials for S3 come from the usual AWS chain instead."""

    model_config = SettingsConfigDict(env_prefix="TITA_", extra="ignore", frozen=True)

    store: str = "tita-store"
    """Where data and results live: `s3://bucket/prefix` or a directory."""
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_path_style: bool = False
    """Address buckets as `endpoint/bucket`, as most S3 servers that are not AWS want it."""
    s3_anonymous: bool = False
    """Sign nothing, as public buckets may be read; whatever credentials there are stay unused."""
    cache_dir: Path = Path("~/.cache/tita")
    """Downloaded objects, kept by digest; shared by all jobs of a node where it is a volume."""
    cache_max_gib: Annotated[float, Field(gt=0)] | None = None
    """Of downloaded objects; those not used for longest make room. None: while the disk has any."""
    scratch_dir: Path | None = None
    """Working files of a job; the system's temporary folder if not given."""

    run: str | None = None
    """Id of this run: on a cluster the Job's name."""
    recipe: str | None = None
    """This run's overrides of the job's default recipe, as a JSON object."""
    num_nodes: Annotated[int, Field(ge=1)] = 1
    node_rank: Annotated[int, Field(ge=0)] = 0
    procs_per_node: Annotated[int, Field(ge=1)] = 1
    """Worker processes of one node: one a GPU."""
    master_addr: str = "127.0.0.1"
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    termination_log: Path | None = None
    """Where a job leaves its last word as JSON; on a cluster /dev/termination-log."""

    api_keys: SecretStr | None = None
    """Bearer keys that the inference server accepts, separated by commas."""
    registry: Path | None = None
    """YAML of models laid over `tita-bench`'s own, where `--registry` names none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    debug: bool = False
    """Show tracebacks of errors that are told in one line otherwise."""


@cache
def settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        TitaError: a variable has a value that does not fit; the value itself is not repeated.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = "TITA_" + "_".join(str(part) for part in first["loc"]).upper()
        raise TitaError(first["msg"].lower(), where=name, remedy="mend or unset it") from None
