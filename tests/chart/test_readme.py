"""The chart's README is what its generator writes, and names every job's exit codes."""

import re
from types import SimpleNamespace

from tita.errors import ExitCode


def test_the_table_of_values_is_up_to_date(chart: SimpleNamespace) -> None:
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    old = (chart.path / "README.md").read_text()
    assert script.readme(old, (chart.path / "values.yaml").read_text()) == old


def test_the_generator_reads_defaults_notes_and_nesting(chart: SimpleNamespace) -> None:
    script = chart.load_script(chart.root / "charts" / "write_readme.py")
    source = (
        "# no value\n\na:\n  # -- First\n  # and more.\n  b: [1]\n  # -- Second.\n"
        "  # @default -- the release\n  c: ''\n# plain comment\nd: 1\n"
    )
    assert list(script.documented(source)) == [
        ("a.b", "`[1]`", "First and more."),
        ("a.c", "the release", "Second."),
    ]


def test_the_table_of_retries_has_the_codes_of_the_policy(chart: SimpleNamespace) -> None:
    readme = (chart.path / "README.md").read_text()
    never, uncounted = re.findall(r"^\| ([\d, ]+).*\|$", readme, re.MULTILINE)[1:3]
    assert {int(code) for code in re.findall(r"\d+", never)} == {
        ExitCode.USER, ExitCode.OUT_OF_MEMORY,
    }  # fmt: skip
    assert {int(code) for code in re.findall(r"\d+", uncounted)} == {
        ExitCode.RETRY, ExitCode.LOST_PEER, ExitCode.TERMINATED,
    }  # fmt: skip


def test_commands_in_the_readme_render(chart: SimpleNamespace) -> None:
    readme = (chart.path / "README.md").read_text()
    (install,) = re.findall(r"^helm install tita charts/tita (.+)$", readme, re.MULTILINE)
    flags = [part for part in install.split() if part != "--set"]
    done = chart.run_helm("template", "tita", str(chart.path), *[f"--set={flag}" for flag in flags])
    assert done.returncode == 0, done.stderr
