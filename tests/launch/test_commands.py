"""`tita launch` and `tita jobs` as processes: what they print, and their exit codes."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tita.errors import ExitCode, TitaError, Unreachable
from tita.jobspec import job_names
from tita.launch.cluster import Cluster, RetryPolicy
from tita.launch.jobs import cancel, delete, list_names, read_status
from tita.launch.kubeconfig import load_access
from tita.storage import open_store


def test_invalid_recipe_is_refused_before_anything_is_created(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--set", "betta=0.2")
    assert done.returncode == ExitCode.USER
    assert "did you mean 'beta'" in done.stderr
    done = lab.cli("launch", "benchmark", "--set", "metric=exakt")
    assert done.returncode == ExitCode.USER
    assert "unknown metric 'exakt'; choose one of" in done.stderr
    assert not any(request.startswith("POST") for request in lab.api.requests)


def test_dry_run_prints_the_job(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--gpus", "8", "--dry-run", "-o", "json", "--name", "x")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"]["parallelism"] == 2
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_failed_preflight_is_reported(lab: Any) -> None:
    done = lab.cli("launch", "train-dpo", "--gpus", "8", "--nodes", "1", "--detach")
    assert done.returncode == ExitCode.USER
    assert "0 of 2 nodes can hold a pod with 8 GPUs; the largest has 4" in done.stderr
    assert "not submitted" in done.stderr
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_unreachable_cluster(lab: Any) -> None:
    lab.api.stop()
    typo = lab.cli("launch", "trian-dpo")
    assert typo.returncode == ExitCode.USER, "reported before connecting"
    known = ", ".join(job_names())
    assert f"no job named 'trian-dpo'; choose one of {known}" in typo.stderr
    done = lab.cli("jobs", "list")
    assert done.returncode == ExitCode.UNREACHABLE
    assert "does not answer" in done.stderr


@pytest.mark.parametrize(
    ("status", "page", "words"),
    [
        (200, b"<html>Log in</html>", r"does not answer \(the response is not JSON\)"),
        (200, b"[]", r"does not answer \(the response is not a JSON object\)"),
        (200, b'{"error": "log in"}', r"does not answer \(the response is not a list of objects\)"),
        (403, b'"Log in"', '^/apis/batch/v1/namespaces/lab/jobs: "Log in"$'),
        (401, b"null", "; log in to the cluster again$"),
    ],
)
def test_page_of_a_proxy_is_not_the_api(
    lab: Any, monkeypatch: pytest.MonkeyPatch, status: int, page: bytes, words: str
) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = Path(lab.environment()["KUBECONFIG"])
        content = yaml.safe_load(config.read_text())
        content["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{server.server_port}"}
        config.write_text(yaml.safe_dump(content))
        monkeypatch.setenv("KUBECONFIG", str(config))
        cluster = Cluster(load_access(), retry=RetryPolicy(attempts=1))
        with pytest.raises(TitaError, match=words) as caught:
            list_names(cluster)
        assert isinstance(caught.value, Unreachable) == (status == 200)
        server.shutdown()


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "one/status", "One"])
def test_what_is_no_name_selects_nothing(lab: Any, name: str) -> None:
    """A URL that ends behind `jobs/` stands for all Jobs of the namespace."""
    lab.submit("one")
    for act in (delete, cancel, read_status):
        with pytest.raises(TitaError, match=f"{re.escape(repr(name))} cannot be the name"):
            act(lab.cluster, name)
    assert lab.api.get("jobs.batch", "one")
    assert not any(r.startswith(("DELETE", "PATCH")) for r in lab.api.requests)
    if not name:
        done = lab.cli("jobs", "delete", name)
        assert done.returncode == ExitCode.USER
        assert "jobs.batch: '' cannot be the name of an object" in done.stderr


def test_job_of_something_else_is_no_run(lab: Any) -> None:
    lab.api.put("jobs.batch", {"metadata": {"name": "backup"}, "spec": {}})
    for act in (delete, cancel, read_status):
        with pytest.raises(TitaError, match="no run 'backup'"):
            act(lab.cluster, "backup")
    assert lab.api.get("jobs.batch", "backup")["spec"] == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--store", "s3://other"), "--store: a run in the cluster uses the store of its release"),
        (("--local", "-n", "lab"), "--local uses no cluster; omit --release, --context"),
        (("--name", ""), "run name '': not a valid name"),
    ],
)
def test_options_without_an_effect_are_refused(
    lab: Any, options: tuple[str, ...], words: str
) -> None:
    done = lab.cli("launch", "train-dpo", *options)
    assert done.returncode == ExitCode.USER
    assert words in done.stderr
    assert not any(key[0] == "jobs.batch" for key in lab.api.objects)


def test_list_status_cancel_delete(lab: Any) -> None:
    made = lab.cli("launch", "train-dpo", "--name", "one", "--detach", "-o", "json")
    assert json.loads(made.stdout) == {"run": "one", "job": "train-dpo", "namespace": "lab"}
    listed = json.loads(lab.cli("jobs", "list", "-o", "json").stdout)
    assert [(row["run"], row["job"]) for row in listed] == [("one", "train-dpo")]
    pod = lab.api.pod("one")
    lab.api.waiting(pod, "ErrImagePull", "denied")
    shown = lab.cli("jobs", "status", "one")
    assert "ErrImagePull" in shown.stdout + shown.stderr
    assert lab.cli("jobs", "cancel", "one").returncode == 0
    assert lab.api.get("jobs.batch", "one")["spec"]["activeDeadlineSeconds"] == 1
    lab.api.job_over("one", "Failed", reason="DeadlineExceeded")
    shown = lab.cli("jobs", "status", "one")
    assert "one was cancelled" in shown.stderr
    assert "activeDeadlineSeconds" not in shown.stderr
    assert " cancelled " in shown.stdout
    assert " cancelled " in lab.cli("jobs", "list").stdout
    assert lab.cli("jobs", "delete", "one").returncode == 0
    assert lab.cli("jobs", "status", "one").returncode == ExitCode.USER


def test_submitted_run_that_may_not_be_watched(lab: Any) -> None:
    lab.api.denied.add(("list", "jobs.batch"))
    done = lab.cli("launch", "train-dpo", "--name", "one", "--no-preflight")
    assert done.returncode == ExitCode.USER
    assert "submitted one" in done.stderr
    assert "cannot watch one, which continues: jobs.batch is forbidden" in done.stderr
    assert lab.api.get("jobs.batch", "one")


def test_list_does_not_break_names_at_80_columns(lab: Any) -> None:
    longest = "n" * 57
    for run in ("train-dpo-20261124-093015-k3f", longest):
        lab.submit(run)
    lab.api.job_over("train-dpo-20261124-093015-k3f", "Failed", reason="PodFailurePolicy")
    rows = [line.split() for line in lab.cli("jobs", "list").stdout.splitlines()]
    assert ["train-dpo-20261124-093015-k3f", "train-dpo", "failed", "0/1"] in [r[:4] for r in rows]
    assert [longest, "train-dpo", "scheduling", "0/1"] in [r[:4] for r in rows]


def test_list_shows_release_and_namespace(lab: Any) -> None:
    for key, item in list(lab.api.objects.items()):
        if key[0] in ("cronjobs.batch", "serviceaccounts"):
            metadata = item["metadata"] | {"namespace": "other", "uid": f"2-{key[2]}"}
            lab.api.put(key[0], item | {"metadata": metadata})
    for namespace in ("lab", "other"):
        made = lab.cli("launch", "train-dpo", "--name", "one", "--detach", "-n", namespace)
        assert made.returncode == 0, made.stderr
    lab.api.pod("one", node="node-1", namespace="other")

    def rows(*options: str) -> list[tuple[str, ...]]:
        found = json.loads(lab.cli("jobs", "list", "-o", "json", *options).stdout)
        return [(row["run"], row["release"], row["namespace"], row["phase"]) for row in found]

    assert rows() == [("one", "tita", "lab", "scheduling")]
    assert sorted(rows("-A")) == [
        ("one", "tita", "lab", "scheduling"),
        ("one", "tita", "other", "running"),
    ]


def test_logs_without_following(lab: Any) -> None:
    lab.submit("my-run", gpus=8)
    for rank in (0, 1):
        lab.api.write(lab.api.pod("my-run", rank, node=f"node-{rank + 1}"), f"rank {rank}")
    done = lab.cli("jobs", "logs", "my-run", "--no-follow")
    assert (done.stdout, done.returncode) == ("rank 0\n", 0)
    done = lab.cli("jobs", "logs", "my-run", "--no-follow", "--all-ranks")
    assert done.stdout == "0| rank 0\n1| rank 1\n"


def test_logs_after_the_pods_are_gone(lab: Any, tmp_path: Path) -> None:
    lab.submit("r")
    lab.api.job_over("r", "Complete")
    done = lab.cli("jobs", "logs", "r")
    assert done.returncode == ExitCode.FAILED
    assert "no pod of r is left, and no log of it can be read from the store" in done.stderr
    job = lab.api.get("jobs.batch", "r")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (store,) = [entry for entry in container["env"] if entry["name"] == "TITA_STORE"]
    store["value"] = str(tmp_path / "store")
    lab.api.put("jobs.batch", job)
    open_store(store["value"]).put("logs/r/1.log.gz", gzip.compress(b"step 1\nstep 2\n"))
    done = lab.cli("jobs", "logs", "r")
    assert (done.stdout, done.returncode) == ("step 1\nstep 2\n", 0)
