"""Commands and options that messages recommend: they exist, and act on the user's run."""

import ast
import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tita.errors import ExitCode
from tita.launch.objects import main_container
from tita.launch.outcome import run_outcome
from tita.launch.scope import CommandScope
from tita.settings import settings
from tita.storage import open_store

ROOT = Path(__file__).parents[2]
_COMMAND = re.compile(r"\b(tita (?:jobs|launch|doctor|promote|runs|data|reports) ?[a-z]*)")


def test_scope_adds_the_options_of_this_command() -> None:
    scope = CommandScope(context="my ctx", namespace="tita2", release="vlm")
    assert scope.tita("jobs delete", "r") == "tita jobs delete r -n tita2 --context 'my ctx'"
    assert scope.tita("doctor") == "tita doctor -n tita2 --context 'my ctx' --release vlm"
    assert scope.kubectl("get", "pvc") == "kubectl -n tita2 --context 'my ctx' get pvc"
    assert scope.tita("launch", "j", "--release", "x").count("--release") == 1
    assert scope.helm("upgrade", "x") == "helm -n tita2 --kube-context 'my ctx' upgrade x"
    assert CommandScope().tita("jobs watch", "r") == "tita jobs watch r"


def test_scope_names_the_store_of_the_run() -> None:
    scope = CommandScope(namespace="tita2").on_store("s3://b/its store")
    assert scope.tita("runs show", "r") == "tita runs show r --store 's3://b/its store'"
    rollback = scope.tita("promote", "--rollback")
    assert rollback == "tita promote --rollback -n tita2 --store 's3://b/its store'"
    assert scope.tita("jobs list") == "tita jobs list -n tita2"
    assert (
        scope.fill("see {tita reports list}") == "see tita reports list --store 's3://b/its store'"
    )
    here = CommandScope().on_store(settings().store)
    assert here.tita("runs list") == "tita runs list", "the default directory needs no option"


_WITH_OPTIONS = r"(?:tita (?:jobs|launch|doctor|promote|runs|reports|data)|kubectl|helm) [a-z-]+"


def test_commands_in_messages_of_the_launcher_carry_options() -> None:
    """They are written as `{tita doctor}` or made by `CommandScope`, never as plain text."""
    plain = [
        (path, text)
        for path, text in literals()
        if path.startswith("tita/launch/")
        and re.search(rf"(?:`|: |or |with |see ){_WITH_OPTIONS}", text.replace("{tita ", "{"))
    ]
    # Completed by `CommandScope`, or about the kubeconfig itself.
    allowed = ("kubectl config get-contexts", "kubectl config view")
    assert [entry for entry in plain if not any(words in entry[1] for words in allowed)] == []


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (ExitCode.GATE_MISSED, "tita reports open latest --store s3://tita/lab"),
        (ExitCode.INCOMPLETE, "tita doctor -n lab"),
        (ExitCode.RETRY, "tita doctor -n lab"),
    ],
)
def test_remedies_of_exit_codes_carry_options(lab: Any, code: int, command: str) -> None:
    lab.submit()
    pod = lab.api.pod("r", node="node-1")
    lab.api.end_pod(pod, code)
    lab.api.job_over("r", "Failed", reason="PodFailurePolicy")
    job = lab.api.get("jobs.batch", "r")
    for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]:
        if entry["name"] == "TITA_STORE":
            entry["value"] = "s3://tita/lab"
    scope = CommandScope(namespace="lab")
    outcome = run_outcome(job, [lab.api.get("pods", pod)], run="r", scope=scope)
    assert command in "\n".join(outcome.remedies)


@pytest.fixture
def namesakes(lab: Any) -> Any:
    """Run `r` failed in namespace `tita2`, and a good run `r` in the context's namespace."""
    for key, item in list(lab.api.objects.items()):
        if key[0] in ("cronjobs.batch", "serviceaccounts"):
            other = copy.deepcopy(item)
            other["metadata"] |= {"namespace": "tita2", "uid": f"2-{item['metadata']['uid']}"}
            lab.api.put(key[0], other)
    extra = ["--set", "beta=0.25", "--set", "out=runs/it's here", "--gpus", "4"]
    extra += ["--gang-timeout", "600"]
    for namespace in ("lab", "tita2"):
        done = lab.cli("launch", "train-dpo", "--name", "r", *extra, "--detach", "-n", namespace)
        assert done.returncode == 0, done.stderr
    failed = lab.api.pod("r", node="node-1", suffix="bad", namespace="tita2")
    lab.api.end_pod(failed, 1)
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded", namespace="tita2")
    return lab


def run_command(lab: Any, command: str) -> subprocess.CompletedProcess[str]:
    """Run a recommended `tita` command as a user who copies it; a launch is not watched."""
    words = shlex.split(command)
    assert words[0] == "tita", command
    return lab.cli(*words[1:], *(["--detach"] if words[1] == "launch" else []))  # type: ignore[no-any-return]


def test_recommended_commands_act_on_the_failed_run(namesakes: Any) -> None:
    lab = namesakes
    good = lab.api.get("jobs.batch", "r", namespace="lab")
    bad = lab.api.get("jobs.batch", "r", namespace="tita2")
    told = lab.cli("jobs", "watch", "r", "-n", "tita2").stderr
    resume = next(line for line in told.splitlines() if "tita jobs delete" in line)
    assert "--set beta=0.25" in resume
    for command in resume[resume.index("tita jobs delete") :].split(" && "):
        done = run_command(lab, command)
        assert done.returncode == 0, done.stderr
    assert lab.api.get("jobs.batch", "r", namespace="lab") == good
    again = lab.api.get("jobs.batch", "r", namespace="tita2")
    assert again["metadata"]["uid"] != bad["metadata"]["uid"]
    spec = [job["spec"]["template"]["spec"]["containers"][0] for job in (bad, again)]
    assert spec[0] == spec[1], "the same run again"


def test_every_message_carries_the_namespace(namesakes: Any) -> None:
    lab = namesakes
    for arguments in (
        ("jobs", "status", "r"), ("jobs", "watch", "r"), ("jobs", "logs", "r"),
        ("jobs", "cancel", "r"), ("jobs", "status", "nobody"),
        ("launch", "train-dpo", "--name", "r", "--gpus", "4"),
    ):  # fmt: skip
        told = lab.cli(*arguments, "-n", "tita2").stderr
        commands = _COMMAND.findall(told)
        assert commands, (arguments, told)
        for found in re.findall(r"tita (?:jobs|launch|doctor)[^`;&)\n]*", told):
            assert "-n tita2" in found, (arguments, found)


def test_no_checkpoint_is_promised_where_there_is_none(lab: Any) -> None:
    (pod,) = lab.running()
    lab.api.end_pod(pod, 2)
    lab.api.job_over("r", "Failed", reason="PodFailurePolicy")
    lab.outcome()
    assert "checkpoint" not in lab.view.text, "the recipe is refused again"
    assert "launch it again when the cause is fixed" in lab.view.text


_DUMP = """
import json, typer
from tita.cli.bench import app as bench
from tita.cli.commands import app
found, options = [], []
def walk(command, name):
    found.append(name)
    for parameter in command.params:
        options.extend([*parameter.opts, *parameter.secondary_opts])
    for sub, inner in getattr(command, "commands", {}).items():
        walk(inner, f"{name} {sub}")
walk(typer.main.get_command(app), "tita")
walk(typer.main.get_command(bench), "tita-bench")
print(json.dumps([found, options]))
"""
_OTHER_PROGRAMS = ("tita/gang/torchrun.py", "tita/launch/local.py", "tita/provenance.py")
"""Modules that run torchrun, nvidia-smi and git, whose options are not tita's."""


_OPTIONS_OF_OTHERS = (
    *("--replicas", "--container", "--previous", "--patch"),  # kubectl
    *("--kube-context", "--reset-then-reuse-values"),  # helm
)


def literals() -> Iterator[tuple[str, str]]:
    """String literals of the package that are neither docstrings nor parts of them."""
    for path, node, docs in nodes():
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in docs:
            yield path, text


def calls() -> Iterator[tuple[str, str]]:
    """The commands that `CommandScope` and `store_command` complete."""
    for path, node, _ in nodes():
        if isinstance(node, ast.Call) and isinstance(node.args and node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("tita", "store_command"):
                yield path, f"`tita {node.args[0].value}`"


def nodes() -> Iterator[tuple[str, ast.AST, set[int]]]:
    """(module, node, ids of its docstrings) of every node of the package."""
    for path in sorted((ROOT / "tita").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            yield str(path.relative_to(ROOT)), node, docs


def test_recommended_commands_and_options_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DUMP], capture_output=True, text=True, check=True, timeout=60
    )
    commands, options = json.loads(done.stdout)
    num_commands = num_options = 0
    unknown = []
    for path, text in (*literals(), *calls()):
        # A command in backticks, or one after a colon: "to delete it: tita jobs delete".
        for words in re.findall(r"(?:[`{]|: |or |with )(tita(?:-bench)? [a-z][-a-z ]*[a-z])", text):
            num_commands += 1
            assert any(words == c or words.startswith(f"{c} ") for c in commands[1:]), (path, text)
            group = " ".join(words.split()[:2])
            if any(c.startswith(f"{group} ") for c in commands) and len(words.split()) > 2:
                assert " ".join(words.split()[:3]) in commands, (path, text)
        for option in re.findall(r"(?<![-\w])--[a-z][-a-z]+", text):
            num_options += 1
            known = option in (*options, *_OPTIONS_OF_OTHERS, "--help")
            if not known and path not in _OTHER_PROGRAMS:
                unknown.append((path, option))
    assert not unknown
    assert num_commands > 15
    assert num_options > 50


@pytest.mark.parametrize(
    ("job", "steps", "words"),
    [
        ("train-dpo", (), "it has no checkpoint and starts from the beginning: "),
        ("train-dpo", (20, 40), "resume from its last checkpoint: "),
        ("build-pairs", (), "launch it again; it keeps the batches that are finished: "),
    ],
)
def test_a_run_is_said_to_go_on_only_where_it_does(
    lab: Any, tmp_path: Path, job: str, steps: tuple[int, ...], words: str
) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "state").write_text("state")
    for step in steps:
        store.push_tree(tmp_path / "node", f"runs/r/checkpoints/{step}/node-0")
    lab.submit(job=job)
    found = lab.api.get("jobs.batch", "r")
    for entry in main_container(found["spec"]["template"])["env"]:
        if entry["name"] == "TITA_STORE":
            entry["value"] = str(tmp_path / "store")
    lab.api.put("jobs.batch", found)
    pod = lab.api.pod("r", node="node-1")
    lab.watch()
    lab.api.end_pod(pod, 1)
    lab.api.job_over("r", "Failed", reason="BackoffLimitExceeded")
    lab.outcome()
    assert words in lab.view.text
    assert ("last complete checkpoint: " in lab.view.text) == bool(steps)
    assert lab.view.text.count("/checkpoints/40") == bool(steps)
