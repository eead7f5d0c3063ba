"""The other nodes of a vLLM engine that spans several: they run its workers, and answer nothing."""

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_engine import set_up, translate_start_errors
from tita.errors import LostPeer
from tita.storage import Store
from tita.vlm.loading import Models


def run_workers(models: Models, options: VllmOptions, *, store: Store | None = None) -> None:
    """Run this node's workers until one of them ends, as they do when node 0 is lost.

    Args:
        models: outlines of the models, the same as on node 0.
        options: of vLLM, the same as on node 0 but for `node_rank`.
        store: the store of models that are trees.

    Raises:
        TitaError: vLLM does not support these models together, or cannot load them.
        LostPeer: a worker has ended.
    """
    setup = set_up(models, options, store=store)
    with translate_start_errors(models):
        config = setup.args.create_engine_config(headless=True)
        executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)
    raise LostPeer(
        "a worker of vLLM has ended",
        where=f"node {options.node_rank}",
        remedy="see its log above; all nodes of the group have to be started again",
    )
