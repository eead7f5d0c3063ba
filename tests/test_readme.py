"""What the READMEs promise: the same commands in both languages, and every one of them works."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def commands(readme: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / readme).read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_both_languages_have_the_same_commands() -> None:
    assert commands("README.md")
    assert commands("README.md") == commands("README.zh-CN.md")


def test_both_languages_have_the_same_sections() -> None:
    one, other = (
        re.findall(r"^(#+) ", (ROOT / name).read_text(), flags=re.MULTILINE)
        for name in ("README.md", "README.zh-CN.md")
    )
    assert one == other


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_continuous_integration_runs_the_two_first_commands(command: str) -> None:
    assert command in commands("README.md")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert any(line.split("#")[0].strip().startswith(command) for line in lines)


def test_every_command_is_one_that_tests_know_how_to_run() -> None:
    known = {"make", "tita", "tita-bench", "helm"}
    assert {shlex.split(command)[0] for command in commands("README.md")} <= known


def test_links_lead_somewhere() -> None:
    for readme in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / readme).read_text()):
            assert (ROOT / target).exists(), f"{readme} links to {target}"
