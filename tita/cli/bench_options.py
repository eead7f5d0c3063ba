"""Options that several commands of `tita-bench` share, and how they are parsed."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tita.bench.load_shape import Arrivals
from tita.bench.reasoning import Thinking
from tita.cli.engine_arguments import EngineChoice
from tita.cli.guidance_options import parse_rewards
from tita.imports import without_garbage_collection
from tita.terminal import counted, say

if TYPE_CHECKING:
    from tita.bench.fetched_images import ImageDownloads
    from tita.bench.load_shape import ClientOptions
    from tita.bench.request_body import FieldOverrides
    from tita.bench.tasks import BenchmarkTask
    from tita.bench.worker_pool import RequestStats

_LATE_S = 0.1
"""Requests that are sent later than this at a given rate are reported."""

Questions = Annotated[str, typer.Option(help="Question file: a path, or a file in the store.")]
Images = Annotated[
    str | None, typer.Option(help="Folder of images; default: the folder of the question file.")
]
FetchImages = Annotated[
    bool,
    typer.Option(
        "--fetch-images", help="Download images that rows name by URL, to the folder of images."
    ),
]
ImageHost = Annotated[
    list[str] | None,
    typer.Option(
        help="Host that --fetch-images may ask; repeatable, .example.org matches its subdomains. "
        "Default: up to 16 public hosts.",
    ),
]
PrivateHosts = Annotated[
    bool,
    typer.Option("--private-hosts", help="Allow private addresses of the hosts in --image-host."),
]
Out = Annotated[Path, typer.Option(help="Results file; an existing one is resumed.")]
ModelName = Annotated[str, typer.Option(help="Short name in the registry, or model id.")]
BaseUrl = Annotated[str | None, typer.Option(help="Endpoint URL, up to and including /v1.")]


def _check_key(given: str | None) -> str | None:
    """An unset variable of the shell lets `--api-key $KEY` take the next option for the key."""
    if given is not None and given.startswith("--"):
        raise typer.BadParameter(f"{given} is an option; is the variable with the key set?")
    return given


ApiKey = Annotated[
    str | None,
    typer.Option(
        help="API key; prefer --key-file or the registry's key_env.",
        callback=_check_key,
    ),
]
KeyFile = Annotated[Path | None, typer.Option(help="File that contains the API key.")]
RegistryFile = Annotated[Path | None, typer.Option(help="YAML file of models and prices.")]
LocalModel = Annotated[
    str | None, typer.Option(help="Model to run in this process: path, hub name or store tree.")
]
Reward = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]MODEL",
        help="Reward model that guides --local-model; repeatable with names.",
    ),
]
MaxQuestions = Annotated[
    int | None, typer.Option("--max", min=1, help="Maximum number of questions.")
]
MetricName = Annotated[
    str, typer.Option(help="Metric of the questions that name none; default: not scored.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")]
Concurrency = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of requests in flight; default: 8, with --rate 256."),
]
Rate = Annotated[float | None, typer.Option(help="Requests per second.")]
ArrivalPattern = Annotated[
    Arrivals,
    typer.Option("--arrivals", help="Times between requests at --rate."),
]
Duration = Annotated[
    str | None,
    typer.Option(help="Send requests for this time, such as 60s, and repeat the questions."),
]
WarmUp = Annotated[
    int, typer.Option(min=0, help="Number of requests before the measurement, not recorded.")
]
Goodput = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=TIME,...",
        help="Limits that a request must meet to count for the goodput: ttft=500ms,itl=50ms.",
    ),
]
Timeout = Annotated[float, typer.Option(help="Timeout of one attempt in seconds.")]
Retries = Annotated[int, typer.Option(min=0, help="Maximum number of retries per question.")]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Request exactly --max-new-tokens tokens per answer."),
]
ThinkingMode = Annotated[
    Thinking,
    typer.Option(
        "--thinking",
        help="What to do with <think>...</think> before scoring: cut it off where it is closed "
        "(auto), also where it is not (cut), or keep it.",
    ),
]
Omit = Annotated[
    list[str] | None, typer.Option(help="Field that requests do not contain; repeatable.")
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="Rename a field of requests, such as max_tokens=max_completion_tokens; repeatable.",
    ),
]
Body = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=JSON",
        help="Additional field of requests, such as reasoning_effort='\"low\"'; repeatable.",
    ),
]


def make_task(
    questions: str,
    *,
    images: str | None,
    fetch_images: bool,
    image_host: list[str] | None,
    private_hosts: bool,
    ignore_column: list[str] | None,
    out: Path,
    max_questions: int | None,
    max_new_tokens: int,
    temperature: float,
    weight: float | None,
    weights: Mapping[str, float] | None = None,
    metric: str,
    fixed_length: bool,
    thinking: Thinking,
    overrides: "FieldOverrides",
) -> "BenchmarkTask":
    """The task of the options; its generation options are checked.

    Raises:
        TitaError: the results file is in the store, an override does not fit the request, or
            fetched images would be written to the store.
    """
    from tita.bench.questions import image_folder, question_file
    from tita.bench.request_body import GenerationOptions
    from tita.bench.tasks import BenchmarkTask
    from tita.errors import TitaError

    file = question_file(questions)
    folder = image_folder(images, questions=file)
    if str(out).startswith("s3:/"):
        raise TitaError(
            "a results file is appended to, which the store does not support",
            where=str(out),
            remedy="give a local path, and publish with `tita-bench eval --publish`",
        )
    if fetch_images and not is_local(questions if images is None else images, folder=folder):
        raise TitaError(
            "fetched images are not written to the store", remedy="give --images FOLDER"
        )
    downloads = make_downloads(
        fetch_images, folder=folder, image_host=image_host, private_hosts=private_hosts
    )
    generation = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, weight=weight,
        weights=weights or {},
        fixed_length=fixed_length, thinking=thinking, overrides=overrides,
    )  # fmt: skip
    try:
        json.dumps(generation.request_fields(), allow_nan=False)
    except ValueError:
        raise TitaError(
            "JSON has neither NaN nor infinity",
            where="--temperature or --body",
            remedy="give finite numbers",
        ) from None
    return BenchmarkTask(
        questions=file, images=folder, out=out, limit=max_questions, generation=generation,
        metric=metric, ignore_columns=tuple(ignore_column or ()), downloads=downloads,
    )  # fmt: skip


def is_local(where: str, *, folder: Path) -> bool:
    """Whether `folder` is or holds the local path `where`, and is no copy of the store's."""
    given = Path(where).expanduser().absolute()
    return folder.absolute() in (given, given.parent)


def make_downloads(
    fetch_images: bool, *, folder: Path, image_host: list[str] | None, private_hosts: bool
) -> "ImageDownloads | None":
    """The downloads of `--fetch-images`; None without it.

    Raises:
        TitaError: an option is given that has no effect.
    """
    from tita.bench.fetched_images import image_downloads
    from tita.errors import TitaError

    if fetch_images:
        return image_downloads(folder, hosts=tuple(image_host or ()), private=private_hosts)
    if image_host or private_hosts:
        raise TitaError(
            "--image-host and --private-hosts need --fetch-images", remedy="give --fetch-images"
        )
    return None


def make_asker(
    model: str,
    *,
    base_url: str | None,
    api_key: str | None,
    key_file: Path | None,
    registry: Path | None,
    local_model: str | None,
    reward: list[str] | None,
    engine: EngineChoice,
    before_dpo: str | None = None,
) -> "Callable[[BenchmarkTask, ClientOptions], RequestStats]":
    """A function that asks the questions of a task: `local_model` if it is given, or an endpoint.

    Args:
        before_dpo: reward model of the control of this name, with `local_model`.

    Raises:
        TitaError: no endpoint is known, or the options contradict each other.
    """
    if local_model is not None:
        with without_garbage_collection():
            from tita.bench.local_model import run_local

        alone, several = parse_rewards(reward)

        def ask_local(task: "BenchmarkTask", options: "ClientOptions") -> "RequestStats":
            method = task.generation.method
            is_before = method is not None and method.control == "before DPO"
            return run_local(
                task, name=model, base=local_model,
                reward=before_dpo if is_before else alone, rewards={} if is_before else several,
                batch_size=options.concurrency, engine_name=engine.value,
            )  # fmt: skip

        return ask_local
    from tita.bench.registry import resolve_endpoint
    from tita.bench.tasks import run_endpoint
    from tita.errors import TitaError

    if reward:
        raise TitaError("--reward needs --local-model", remedy="give --local-model too")
    if engine is not EngineChoice.TRANSFORMERS:
        raise TitaError("--engine needs --local-model", remedy="give --local-model too")
    endpoint = resolve_endpoint(
        model, base_url=base_url, api_key=api_key, key_file=key_file, registry=registry
    )
    return lambda task, options: run_endpoint(task, endpoint, options=options)


def parse_overrides(
    *, omit: list[str] | None, rename: list[str] | None, body: list[str] | None
) -> "FieldOverrides":
    """The options `--omit`, `--rename` and `--body`.

    Raises:
        TitaError: `--rename` is not OLD=NEW, or `--body` is not KEY=JSON.
    """
    from tita.bench.request_body import FieldOverrides
    from tita.errors import TitaError

    renamed, fields = {}, {}
    for text in rename or ():
        old, sign, new = text.partition("=")
        if not (sign and old and new):
            raise TitaError(
                f"{text!r} is not OLD=NEW",
                where="--rename",
                remedy="give for example --rename max_tokens=max_completion_tokens",
            )
        renamed[old] = new
    for text in body or ():
        name, sign, value = text.partition("=")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            sign = ""
        if not (sign and name):
            raise TitaError(
                f"the field {name!r} has no JSON value",
                where="--body",
                remedy="quote text twice, as in --body 'reasoning_effort=\"low\"'",
            )
    return FieldOverrides(omit=tuple(omit or ()), rename=renamed, body=fields)


def parse_seconds(text: str, *, option: str) -> float:
    """A time with its unit, such as `500ms`, `60s` or `5m`, in seconds.

    Raises:
        TitaError: the text is no time, or has no unit.
    """
    from tita.errors import TitaError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text.strip())
    if found is None or not float(found[1]):
        raise TitaError(
            f"{text!r} is not a time", where=option, remedy="give a number with ms, s, m or h: 60s"
        )
    return float(found[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def parse_concurrencies(text: str) -> list[int]:
    """The numbers of `--sweep`.

    Raises:
        TitaError: they are not distinct numbers from 1.
    """
    from tita.errors import TitaError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 1:
        raise TitaError(
            f"{text!r} is not a list of distinct numbers from 1",
            where="--sweep",
            remedy="give for example --sweep 1,2,4,8",
        )
    return numbers


def parse_weights(text: str) -> list[float]:
    from tita.errors import TitaError

    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or len(set(weights)) < len(weights) or not all(0 <= w <= 1 for w in weights):
        raise TitaError(
            f"{text!r} is not a list of distinct numbers between 0 and 1",
            where="--weights",
            remedy="give for example --weights 0,0.1,0.3",
        )
    return weights


def print_stats(outs: list[Path], stats: "list[RequestStats]") -> None:
    """Print the counts of each run; exit with 1 if a question failed."""
    from tita.errors import ExitCode

    for out, one in zip(outs, stats, strict=True):
        answered = one.num_asked - one.num_failed + one.num_kept
        before = f" ({one.num_kept} from an earlier run)" if one.num_kept else ""
        say(f"{answered} questions answered{before} in {out}, {one.wall_s:.1f} s")
        if one.num_other_length:
            say(
                f"{counted(one.num_other_length, 'answer')} of another length than requested: "
                "the endpoint ignores ignore_eos or min_tokens"
            )
        if one.late_s > _LATE_S:
            say(
                f"requests were sent up to {one.late_s:.1f} s late, because too many were in "
                "flight; the rate was not reached, give a higher --concurrency"
            )
        if one.num_empty:
            say(f"{counted(one.num_empty, 'answer')} without any text")
        for text in one.failure_lines():
            say(text)
    if any(one.num_failed for one in stats):
        raise typer.Exit(ExitCode.FAILED)
