"""The chart's README: tables of values, exit codes, commands."""

import re
from types import SimpleNamespace
from typing import Any

import yaml
from typer.main import get_command

from tita.align import Guidance
from tita.cli.commands import app
from tita.serve.serve_options import ServeOptions


def test_the_tables_of_values_are_up_to_date(chart: SimpleNamespace) -> None:
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    readme = (chart.path / "README.md").read_text()
    assert script.render(readme, (chart.path / "values.yaml").read_text()) == readme


def test_every_value_is_documented(chart: SimpleNamespace) -> None:
    """Each leaf of values.yaml has a description, or one of its parents has."""
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    source = (chart.path / "values.yaml").read_text()
    documented = {value.path for value in script.documented_values(source)}

    def undocumented(values: dict[str, Any], prefix: str = "") -> list[str]:
        missing = []
        for key, value in values.items():
            path = f"{prefix}{key}"
            if path not in documented:
                nested = isinstance(value, dict) and value
                missing += undocumented(value, f"{path}.") if nested else [path]
        return missing

    assert undocumented(yaml.safe_load(source)) == []


def test_server_defaults_in_the_tables_are_those_of_tita_serve(chart: SimpleNamespace) -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    defaults = {parameter.name: parameter.default for parameter in serve.params}
    readme = (chart.path / "README.md").read_text()
    rows = re.findall(r"^\| `inference\.(\w+)` \| server default: `?([\w.]+)", readme, re.MULTILINE)
    assert {value for value, _ in rows} == {"form", "plausibility", "dtype", "maxBatch"}
    for value, shown in rows:
        # That of the command depends on the engine.
        default = ServeOptions().max_batch if value == "maxBatch" else defaults[value]
        if default is None:
            default = getattr(Guidance.of(), value)  # the form's
        assert type(default)(shown) == default, value


def test_the_readme_script_reads_descriptions_defaults_and_nesting(chart: SimpleNamespace) -> None:
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    source = (
        "# no value\n\na:\n  # -- First\n  # and more.\n  b: [1]\n  # -- Second.\n"
        "  # @default -- the release\n  c: ''\n# plain comment\nd: 1\n"
    )
    assert list(script.documented_values(source)) == [
        ("a.b", "`[1]`", "First and more."),
        ("a.c", "the release", "Second."),
    ]


def test_the_retries_table_has_the_exit_codes_of_the_policy(chart: SimpleNamespace) -> None:
    readme = (chart.path / "README.md").read_text()
    never, uncounted = re.findall(r"^\| ([\d, ]+).*\|$", readme, re.MULTILINE)[1:3]
    cronjob = chart.find(chart.render(), "CronJob", "tita-train-dpo")
    policy = cronjob["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]
    codes = {
        rule["action"]: set(rule["onExitCodes"]["values"])
        for rule in policy["rules"]
        if "onExitCodes" in rule
    }
    assert {int(code) for code in re.findall(r"\d+", never)} == codes["FailJob"]
    assert {int(code) for code in re.findall(r"\d+", uncounted)} == codes["Ignore"]


def test_the_install_command_of_the_readme_renders(chart: SimpleNamespace) -> None:
    readme = (chart.path / "README.md").read_text()
    (install,) = re.findall(r"^helm install tita charts/tita (.+)$", readme, re.MULTILINE)
    flags = [part for part in install.split() if part != "--set"]
    done = chart.run_helm("template", "tita", str(chart.path), *[f"--set={flag}" for flag in flags])
    assert done.returncode == 0, done.stderr
