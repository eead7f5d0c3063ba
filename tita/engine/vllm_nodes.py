"""The other nodes of a vLLM engine that spans several: they run its workers, and answer nothing."""

import socket
import time

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from tita.align.requests import EngineOptions
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_engine import set_up, translate_start_errors
from tita.errors import LostPeer
from tita.storage import Store
from tita.vlm.loading import Models

_CHECK_S = 5.0
"""Pause between checks whether node 0 runs."""
_NUM_CHECKS = 3
"""Failed checks in a row after which node 0 is lost."""


def run_workers(
    models: Models,
    options: VllmOptions,
    *,
    engine_options: EngineOptions,
    store: Store | None = None,
) -> None:
    """Run this node's workers until one of them ends, or node 0 is lost.

    Args:
        models: outlines of the models, the same as on node 0.
        options: of vLLM, the same as on node 0 but for `node_rank`.
        engine_options: the same as on node 0; `max_adapters` is that of all workers.
        store: the store of models that are trees.

    Raises:
        TitaError: vLLM does not support these models together, or cannot load them.
        LostPeer: a worker or node 0 has ended.
    """
    setup = set_up(models, options, engine_options=engine_options, store=store)
    with translate_start_errors(models):
        config = setup.args.create_engine_config(headless=True)
        executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor()
    # vLLM's workers would wait for ever for a node 0 that has ended.
    lost = "node 0"
    while _accepts_connections(options.leader_address, options.leader_port):
        if executor.is_failed:
            lost = "a worker of vLLM"
            break
        time.sleep(_CHECK_S)
    executor.shutdown()
    raise LostPeer(
        f"{lost} has ended",
        where=f"node {options.node_rank}",
        remedy="see the logs; all nodes of the group have to be started again",
    )


def _accepts_connections(address: str, port: int) -> bool:
    """Whether node 0's rendezvous, which lives as long as its workers, can be reached."""
    for _ in range(_NUM_CHECKS):
        try:
            socket.create_connection((address, port), timeout=_CHECK_S).close()
        except OSError:
            time.sleep(_CHECK_S / _NUM_CHECKS)
        else:
            return True
    return False
