"""Two nodes: two torchrun agents in separate networks, every DeepSpeed stage, full and LoRA."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.comparing import largest_difference
from tests.train.network import two_hosts
from tests.train.worker import first_batch
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.errors import ExitCode
from tita.storage import open_store
from tita.train.collators import PairCollator
from tita.train.training_data import make_dataset
from tita.vlm.loading import load_vlm
from tita.vlm.model_set import load_role

Start = Callable[..., Any]
MODEL = "runs/a/model"
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
# The job's defaults: frozen weights are sharded, gathered and recomputed too.
CHECKPOINTED = {"gradient_checkpointing": True, "freeze_vision": True}

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        # A second trainer in the same processes loads the warmed-up model.
        pytest.param(
            "zero3",
            {"lora": LORA, "sft": {"steps": 2}, "image_aspect": "keep", **CHECKPOINTED},
            id="zero3-lora-warm-up",
        ),
        pytest.param("zero3_offload", {}, id="zero3_offload-full", marks=pytest.mark.soak),
        pytest.param("zero2", {}, id="zero2-full", marks=pytest.mark.soak),
        pytest.param("zero3", {}, id="zero3-full", marks=pytest.mark.soak),
        pytest.param("zero2", {"lora": LORA}, id="zero2-lora", marks=pytest.mark.soak),
        pytest.param(
            "zero3_offload", {"lora": LORA}, id="zero3_offload-lora", marks=pytest.mark.soak
        ),
        pytest.param(
            "zero2", {"sft": {"steps": 2}}, id="zero2-full-warm-up", marks=pytest.mark.soak
        ),
    ],
)
def test_a_model_trained_by_two_nodes_gives_equal_logits_when_loaded(
    start: Start,
    data: Any,
    tmp_path: Path,
    stage: str,
    changes: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    said = tmp_path / "said.pt"
    with two_hosts() as hosts:
        nodes = [
            start(
                tmp_path,
                prefix=host.prefix,
                env=host.env | {"SAID": str(said)},
                procs=1,
                deepspeed=stage,
                **changes,
            )
            for host in hosts
        ]
        for ended in [node.finish() for node in nodes]:
            assert ended.code == 0, ended.text
    vlm = load_vlm(str(tmp_path / MODEL), dtype="float32")
    aspect = changes.get("image_aspect", "pad")
    assert vlm.image_aspect == aspect
    rows = make_dataset(
        list(read_pairs(data.pairs)),
        images=data.images,
        processor=vlm.processor,
        image_aspect=vlm.image_aspect,
    )
    with torch.no_grad():
        again = vlm.model(**first_batch(PairCollator(vlm.processor), rows)).logits
    torch.testing.assert_close(again, torch.load(said), rtol=1e-4, atol=1e-4)
    assert largest_difference(demo_model_path("reward"), tmp_path / MODEL) > 1e-5
    assert (tmp_path / MODEL / "model.safetensors").is_file()
    run = json.loads((tmp_path / "runs/a/run.json").read_text())
    started_from = run["warmed_up_model"] or run["start_model"]
    if "lora" in changes:
        adapter = json.loads((tmp_path / "runs/a/adapter/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == started_from["name"]
        # Served as an adapter, it is the model into which it was merged.
        served = load_role(
            "a",
            str(tmp_path / "runs/a/adapter"),
            loaded={},
            load=lambda name: load_vlm(name, store=open_store(str(tmp_path)), dtype="float32"),
            store=open_store(str(tmp_path)),
        )
        assert served.image_aspect == aspect
        assert served.adapters is not None
        with torch.no_grad(), served.adapters.selected([served.adapter]):
            batch = first_batch(PairCollator(served.processor), rows)
            torch.testing.assert_close(served.model(**batch).logits, again, rtol=1e-4, atol=1e-4)
    if "sft" in changes:
        warmed_up = load_vlm(started_from["name"], store=open_store(str(tmp_path)))
        assert warmed_up.image_aspect == aspect
    if request.node.get_closest_marker("soak") and not changes:
        # Neither nodes nor stages change the result; skipped in `make test` to save the other run.
        undisturbed = request.getfixturevalue("undisturbed")
        assert largest_difference(undisturbed / MODEL, tmp_path / MODEL) <= 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_nodes_resume_from_their_own_shards(
    start: Start, undisturbed: Path, tmp_path: Path, stage: str
) -> None:
    for attempt in (1, 2):
        scratch = tmp_path / f"scratch-{attempt}"
        scratch.mkdir()
        with two_hosts() as hosts:
            nodes = [
                start(
                    tmp_path / "store",
                    prefix=host.prefix,
                    env=host.env | {"TITA_SCRATCH_DIR": str(scratch)},
                    procs=1,
                    deepspeed=stage,
                )
                for host in hosts
            ]
            if attempt == 1:
                nodes[0].run_until(3)
                for node in nodes:
                    node.process.send_signal(signal.SIGTERM)
            ended = [node.finish() for node in nodes]
            expected = ExitCode.RETRY if attempt == 1 else 0
            assert [each.code for each in ended] == [expected] * 2, ended
    assert "resuming from step" in ended[0].text
    assert largest_difference(undisturbed / MODEL, tmp_path / "store" / MODEL) <= 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_that_lost_the_other_ends_in_time(start: Start, tmp_path: Path, how: str) -> None:
    with two_hosts() as hosts:
        if how == "cut off" and hosts[1].name is None:
            pytest.skip("needs network namespaces, which only root may make")
        nodes = [
            start(tmp_path, prefix=h.prefix, env=h.env, procs=1, hang_timeout_s=10, epochs=50)
            for h in hosts
        ]
        nodes[0].run_until(3)
        began = time.monotonic()
        if how == "killed":
            for pid in (*nodes[1].workers(), nodes[1].process.pid):
                os.kill(pid, signal.SIGKILL)
        else:
            hosts[1].pull_cable()
        ended = nodes[0].finish()
        # A lost peer, or no step in time: both restart the gang.
        assert ended.code in (ExitCode.LOST_PEER, ExitCode.HUNG), ended.text
        assert time.monotonic() - began < 60
        if how == "cut off":
            assert nodes[1].finish().code in (ExitCode.LOST_PEER, ExitCode.HUNG)
            assert time.monotonic() - began < 60


@pytest.mark.soak
@pytest.mark.parametrize("fate", ["lives", "dies"])
def test_a_node_waits_for_rank_0_while_it_sends_heartbeats(
    start: Start, tmp_path: Path, fate: str
) -> None:
    """The upload of the model takes longer than the timeout of collectives."""
    with two_hosts() as hosts:
        env = {"FAULT": "slow-model"}
        nodes = [
            start(tmp_path, prefix=h.prefix, env=h.env | env, procs=1, hang_timeout_s=6)
            for h in hosts
        ]
        nodes[0].run_until_said("uploading the model")
        if fate == "dies":
            for pid in (*nodes[0].workers(), nodes[0].process.pid):
                os.kill(pid, signal.SIGKILL)
            ended = nodes[1].finish()
            assert ended.code == ExitCode.LOST_PEER, ended.text
        else:
            for ended in [node.finish() for node in nodes]:
                assert ended.code == 0, ended.text


@pytest.mark.parametrize(
    ("phase", "num_nodes"),
    [
        ("checkpoint", 2),
        *(
            pytest.param(phase, num_nodes, marks=pytest.mark.soak)
            for phase in ("start", "rendezvous", "load", "reference", "step", "checkpoint")
            for num_nodes in (1, 2)
            if (phase, num_nodes) != ("checkpoint", 2)
        ),
    ],
)
def test_a_frozen_rank_ends_the_run(
    start: Start, tmp_path: Path, phase: str, num_nodes: int
) -> None:
    # On a busy machine an import may keep a living rank from its heartbeat for seconds.
    bounds = {"TITA_HEARTBEAT_TIMEOUT_S": "8", "FAULT": f"freeze-{phase}"}
    with two_hosts() as hosts:
        nodes = [
            start(
                tmp_path,
                prefix=host.prefix if num_nodes == 2 else (),
                env=bounds | (host.env if num_nodes == 2 else {}),
                procs=2 // num_nodes,
                hang_timeout_s=30,
            )
            for host in hosts[:num_nodes]
        ]
        nodes[-1].run_until_said("the last rank freezes")
        ended = [node.finish() for node in nodes]
    assert "rank 1 (process" in ended[-1].text
    assert "is frozen: no life for" in ended[-1].text
    assert ended[-1].code == ExitCode.HUNG, ended[-1].text
    # The other node restarts with it: it lost a peer, which is not counted twice.
    assert [end.code for end in ended[:-1]] == [ExitCode.LOST_PEER] * (num_nodes - 1), ended[0].text
