"""What the documents show works: values, `--set`, options, and commands."""

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from tests.chart.test_custom_resources import DEFINITIONS, validate
from tests.chart.test_rendering import CUSTOM
from tests.documents import DOCUMENTS, ROOT, code, commands, name_of, prose, split_line
from tita.cli.bench import app as bench
from tita.cli.commands import app
from tita.errors import TitaError
from tita.recipe_sources import parse_overrides
from tita.recipes import RECIPES, load_recipe

DEFAULTS = yaml.safe_load((ROOT / "charts" / "tita" / "values.yaml").read_text())
SCHEMA = yaml.safe_load((ROOT / "charts" / "tita" / "values.schema.json").read_text())
KINDS_OF_OTHERS = set(DEFINITIONS) - CUSTOM
"""Kinds that documents show and the chart does not render."""


def shell_lines(document: Path) -> list[list[str]]:
    """The words of each command in blocks, and in spans that begin with a program's name."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]
    spans = [span for span in spans if re.match(r"(tita|tita-bench|helm|kubectl) [a-z]", span)]
    found = [*commands(document), *(words for span in spans for words in split_line(span))]
    return [words for words in found if "..." not in words[:2]]


COMMANDS = [(name_of(d), words) for d in DOCUMENTS for words in shell_lines(d)]


def blocks_of_values() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for block in code(document, "yaml"):
            content = yaml.safe_load(block) if "apiVersion:" not in block else None
            if isinstance(content, dict) and set(content) <= set(DEFAULTS):
                yield f"{name_of(document)}: {block.splitlines()[0]}", block


VALUES = dict(blocks_of_values())


@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize("block", VALUES.values(), ids=list(VALUES))
def test_values_render(chart: SimpleNamespace, tmp_path: Path, block: str, major: str) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(block)
    bucket = [] if "\ns3:" in f"\n{block}" else ["--set=s3.bucket=my-bucket"]
    flags = [f"--values={file}", "--set=inference.enabled=true", *bucket]
    done = chart.run_helm(
        "template", "tita", str(chart.path), *flags, f"--kube-version={chart.newest}", major=major
    )
    assert done.returncode == 0, done.stderr
    rendered = [o for o in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if o]
    for o in rendered:
        if o["kind"] not in CUSTOM and major == "4":  # both render the same
            kubernetes_validate.validate(o, chart.newest, strict=True)
    benchmark = chart.find(rendered, "CronJob", "tita-benchmark")["spec"]["jobTemplate"]
    assert "gke-accelerator" not in str(benchmark)
    assert "queue-name" not in str(benchmark)


def test_objects_are_valid(chart: SimpleNamespace) -> None:
    """Kueue's queues, the coscheduling plugin's PodGroup, and a LeaderWorkerSet with its pods."""
    shown = [
        o
        for document in DOCUMENTS
        for block in code(document, "yaml")
        if "apiVersion:" in block
        for o in yaml.safe_load_all(block)
    ]
    assert {o["kind"] for o in shown} == KINDS_OF_OTHERS
    for o in shown:
        validate(o)
        if o["kind"] == "LeaderWorkerSet":
            group = o["spec"]["leaderWorkerTemplate"]
            for name in ("leaderTemplate", "workerTemplate"):
                pod = {"apiVersion": "v1", "kind": "Pod", **group[name]}
                kubernetes_validate.validate(pod, chart.newest, strict=True)
                (container,) = pod["spec"]["containers"]
                command, *options = container["args"]
                numbers = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "1"}
                for variable, number in numbers.items():
                    options = [option.replace(variable, number) for option in options]
                parsed = get_command(app).commands[command].make_context(command, options).params  # type: ignore[attr-defined]
                gpus = parsed["tensor_parallel_size"] * parsed["pipeline_parallel_size"]
                assert group["size"] * container["resources"]["limits"]["nvidia.com/gpu"] == gpus


def settings_of(words: list[str]) -> list[str]:
    return [b for a, b in pairwise(words) if a == "--set"]


HELM = [
    words
    for _, words in COMMANDS
    if words[0] == "helm" and words[1] in ("install", "upgrade") and "charts/tita" in words
]


@pytest.mark.parametrize("major", ["3", "4"])
@pytest.mark.parametrize("words", HELM, ids=lambda words: " ".join(words)[:60])
def test_installs_and_upgrades_render(
    chart: SimpleNamespace, tmp_path: Path, words: list[str], major: str
) -> None:
    files = {}
    for block in VALUES.values():
        if named := re.match(r"# (\S+\.yaml)\n", block):
            files[named[1]] = tmp_path / named[1]
            files[named[1]].write_text(block)
    flags = [f"--values={files[b]}" for a, b in pairwise(words) if a == "--values"]
    flags += [f"--set={setting}" for setting in settings_of(words)]
    done = chart.run_helm(
        "template", words[2], str(chart.path), "--set=s3.bucket=my-bucket", *flags,
        major=major,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_commands_were_found() -> None:
    assert len(HELM) >= 8
    assert len(VALUES) >= 6
    assert len([words for _, words in COMMANDS if words[0] == "tita"]) > 60


def inline_settings() -> Iterator[tuple[str, list[str]]]:
    """(document, KEY=VALUE of every `--set`) of every line, outside of complete commands, too."""
    for document in DOCUMENTS:
        for line in document.read_text().replace("\\\n", " ").splitlines():
            shown = re.findall(r"--set[ =]([a-z][\w.-]*=(?:\[[^\]]*\]|[^\s`\"'|;,)]+))", line)
            if settings := [one for one in shown if "..." not in one and "$" not in one]:
                yield name_of(document), settings


def is_chart_value(setting: str) -> bool:
    key = setting.split("=")[0]
    return "." in key and key.split(".")[0] in DEFAULTS


def test_each_set_is_a_chart_value_or_a_recipe_key(chart: SimpleNamespace) -> None:
    found = list(inline_settings())
    assert len(found) > 20
    for document, settings in found:
        for setting in filter(is_chart_value, settings):
            assert value_exists(setting.split("=")[0].split(".")), (document, setting)
        # A key may need another one, which is on the same line.
        keys = [one for one in settings if not is_chart_value(one) and one != "key=value"]
        accepted = []
        for job, recipe in RECIPES.items():
            try:
                load_recipe(recipe, parse_overrides(keys))
                accepted.append(job)
            except TitaError:
                continue
        assert accepted, (document, keys)


def shown_settings() -> dict[str, str]:
    """A flag of helm for each chart value that a document sets: `--set a=c`, `a.b=c`, `a.b: c`."""
    span = re.compile(rf"`((?:{'|'.join(DEFAULTS)})(?:\.[A-Za-z][\w-]*)*)(=|: )([^`]+)`")
    found = {
        setting: f"--set={setting}"
        for _, settings in inline_settings()
        for setting in filter(is_chart_value, settings)
    }
    for document in DOCUMENTS:
        for key, how, value in span.findall(document.read_text()):
            if how == "=":
                found[f"{key}={value}"] = f"--set={key}={value}"
            else:
                found[f"{key}: {value}"] = f"--set-json={key}={json.dumps(yaml.safe_load(value))}"
    return found


@pytest.mark.parametrize("major", ["3", "4"])
def test_each_setting_renders_as_written(chart: SimpleNamespace, major: str) -> None:
    shown = shown_settings()
    assert {"inference.strategy.type=Recreate", "s3.pathStyle: true"} < set(shown)
    base = "--set=s3.bucket=my-bucket,inference.enabled=true"
    for setting, flag in shown.items():
        done = chart.run_helm("template", "tita", str(chart.path), base, flag, major=major)
        assert done.returncode == 0, (setting, done.stderr)


def value_exists(keys: list[str]) -> bool:
    if keys[:2] == ["jobs", "perJob"]:
        return len(keys) < 4 or keys[3] in SCHEMA["definitions"]["job"]["properties"]
    values: Any = DEFAULTS
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            # Objects of the Kubernetes API: only some of their fields have a default.
            return isinstance(values, dict) and keys[-2] in (
                "resources",
                "requests",
                "limits",
                "egress",
            )
        values = values[key]
    return True


def test_values_that_are_named_exist() -> None:
    """Spans such as `inference.weight`."""
    sections = [key for key, value in DEFAULTS.items() if isinstance(value, dict)]
    pattern = re.compile(rf"`((?:{'|'.join(sections)})(?:\.[A-Za-z]\w*)+)(?:[=:][^`]*)?`")
    named = {
        (name_of(document), path)
        for document in DOCUMENTS
        for path in pattern.findall(document.read_text())
        if not re.search(r"\.(yaml|py|json)$", path)
    }
    assert len(named) > 60
    assert {entry for entry in named if not value_exists(entry[1].split("."))} == set()


@cache
def tita_options() -> dict[str, set[str]]:
    """The options of each command, by its words."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, words: str) -> None:
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        found[words] = options | {"--help", "-h"}
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{words} {name}")

    walk(get_command(app), "tita")
    walk(get_command(bench), "tita-bench")
    return found


def test_tita_commands_and_their_options_exist() -> None:
    for document, words in COMMANDS:
        if words[0] not in ("tita", "tita-bench"):
            continue
        command = words[0]
        for word in words[1:]:
            if f"{command} {word}" not in tita_options():
                break
            command += f" {word}"
        assert command != words[0] or "|" in words[1], (document, words)
        given = {w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)}
        assert given <= tita_options()[command], (document, words)


def test_options_that_are_named_exist() -> None:
    """Spans such as `--no-preflight`."""
    known = {option for options in tita_options().values() for option in options}
    others = {"--reset-then-reuse-values", "--reuse-values"}
    others |= {"--controller-address", "--controller-url"}  # of LLaVA's clients
    others |= {"--mode", "--log"}  # of VLMEvalKit, and lmms-eval's --log_samples
    others |= {"--long"}  # of benchmarks/scale.py
    for document in DOCUMENTS:
        named = set(re.findall(r"`(--[a-z][-a-z]+)", document.read_text()))
        assert named <= known | others, (document, named - known - others)


@cache
def help_of(program: Path, *words: str) -> str:
    done = subprocess.run([program, *words, "--help"], capture_output=True, text=True, timeout=60)
    # kubectl lists the options that all commands have separately.
    everywhere = [program, "options"] if program.name == "kubectl" else [program, "--help"]
    more = subprocess.run(everywhere, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + more.stdout


@pytest.mark.parametrize("major", ["3", "4"])
def test_helm_and_kubectl_have_the_commands_and_options(chart: SimpleNamespace, major: str) -> None:
    folder = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir(major)
    for document, words in COMMANDS:
        if words[0] not in ("helm", "kubectl"):
            continue
        command, *rest = words[1:]
        subcommands = 1
        if words[0] == "kubectl" and command in ("create", "rollout") and rest[0] != "-f":
            subcommands = 3 if rest[0] == "secret" else 2
        text = help_of(folder / words[0], *words[1 : 1 + subcommands])
        assert f"{words[0]} {command}" in text, (document, words)
        for option in {w.partition("=")[0] for w in words if w.startswith("-") and len(w) > 1}:
            assert re.search(rf"{re.escape(option)}\b", text), (document, words, option)


NO_CLUSTER = "connection refused|cluster unreachable|no such file|does not exist"
SHOWN = sorted(
    {
        tuple(words)
        for document in DOCUMENTS
        for words in commands(document)
        if words[0] in ("helm", "kubectl")
    }
)


def test_helm_and_kubectl_read_the_commands(chart: SimpleNamespace) -> None:
    """As written, but without a cluster: they report wrong words before they connect."""
    folder = chart.load_script(chart.root / "charts" / "get_helm.py").helm_dir("4")
    assert len(SHOWN) > 20
    for program, *words in SHOWN:
        done = subprocess.run(
            [folder / program, *words], cwd=ROOT, capture_output=True, text=True, timeout=60,
            env={"HOME": "/nonexistent", "KUBECONFIG": "/nonexistent", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        read = done.returncode == 0 or re.search(NO_CLUSTER, done.stderr)
        assert read, (program, words, done.stderr)
