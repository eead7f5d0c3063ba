"""docs/cluster.md: its values render, and its commands are commands."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from tests.chart.test_rendering import CUSTOM
from tita.cli.commands import app

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
VALUES = [block for block in BLOCKS if "apiVersion:" not in block]
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(params=VALUES, ids=lambda block: str(block).splitlines()[0])
def rendered(
    request: pytest.FixtureRequest, chart: SimpleNamespace, tmp_path: Path
) -> list[dict[str, Any]]:
    """What the chart makes of one block of values, with inference switched on."""
    file = tmp_path / "values.yaml"
    file.write_text(request.param)
    bucket = [] if "\ns3:" in f"\n{request.param}" else ["--set=s3.bucket=my-bucket"]
    serving = "--set=inference.enabled=true"
    flags = [f"--values={file}", serving, *bucket, f"--kube-version={chart.newest}"]
    done = chart.run_helm("template", "tita", str(chart.path), *flags)
    assert done.returncode == 0, done.stderr
    return [o for o in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if o]


def test_the_values_render(chart: SimpleNamespace, rendered: list[dict[str, Any]]) -> None:
    for o in rendered:
        if o["kind"] not in CUSTOM:
            kubernetes_validate.validate(o, chart.newest, strict=True)
    benchmark = chart.find(rendered, "CronJob", "tita-benchmark")["spec"]["jobTemplate"]
    assert "gke-accelerator" not in str(benchmark)
    assert "queue-name" not in str(benchmark)


def test_the_commands_are_commands() -> None:
    ours = [shlex.split(line, comments=True) for line in COMMANDS if line.startswith("tita ")]
    assert len(ours) == 8
    for _, *words in ours:
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
