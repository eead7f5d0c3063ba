"""Job specifications: `jobs/<job>.yaml`, which the chart and Python both read."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from tita.errors import TitaError


class JobSpec(BaseModel):
    """What is fixed for a job. The chart decides where it runs; the launcher sets up each run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True
    )

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=30)]
    """Used for the file, the CLI argument, the CronJob's suffix and the label."""
    description: str
    module: str
    """The module that every worker process runs with `python -m`."""
    nodes: Annotated[int, Field(ge=1)] = 1
    one_node: bool = False
    """Whether a run has one node only: its process shares no work with others."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    deadline_seconds: Annotated[int, Field(ge=60)]
    """Maximum duration of a run, pending time included."""
    tries: Annotated[int, Field(ge=0)] = 3
    """Incidents after which the gang starts again; one more ends the run. An incident is whatever
    ends an attempt, however many nodes it takes down; a lost node is none."""
    schedule: str | None = None
    """Cron schedule; without one, the job runs only when launched."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Default hyperparameters, typed in `tita.recipes`."""


def jobs_dir() -> Path:
    """The folder `jobs/`: next to the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "jobs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "jobs"


def chart_dir() -> Path:
    """The Helm chart's folder: in a checkout, or inside the package in a wheel."""
    inside = Path(__file__).parent / "chart"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "charts" / "tita"


def chart_path() -> str:
    """The chart's folder as a word of a command; in a checkout as documentation has it."""
    folder = chart_dir()
    return "charts/tita" if folder.name == "tita" else str(folder)


def job_names() -> list[str]:
    """Names of all jobs, sorted."""
    return sorted(path.stem for path in jobs_dir().glob("*.yaml"))


@cache
def load_job(name: str) -> JobSpec:
    """Read `jobs/<name>.yaml`.

    Raises:
        TitaError: no such job, or an invalid file.
    """
    path = jobs_dir() / f"{name}.yaml"
    if name not in job_names():
        raise TitaError(f"no job named {name!r}", remedy=f"choose one of {', '.join(job_names())}")
    try:
        spec = JobSpec.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValidationError) as error:
        raise TitaError(f"invalid job file: {error}", where=str(path)) from None
    if spec.name != name:
        raise TitaError(f"has name: {spec.name}", where=str(path), remedy=f"change it to {name}")
    return spec


def deepspeed_config(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration `jobs/deepspeed/<name>.json`.

    Raises:
        TitaError: no such file.
    """
    folder = jobs_dir() / "deepspeed"
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        raise TitaError(
            f"no DeepSpeed configuration named {name!r}", remedy=f"choose one of {', '.join(known)}"
        )
    config: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return config


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `override`; nested mappings are merged key by key."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged
