"""A vLLM plugin: base, reward and reference model as one vLLM model, whose logits are combined.

`register` is an entry point of the group `vllm.general_plugins`; vLLM calls it in each of its
processes.
"""

import multiprocessing
import multiprocessing.process
import os
import threading

from tita.vllm_plugin.families import FAMILIES, draft_name, guided_name, plain_name

STARTED_BY_TITA = "TITA_STARTED_VLLM"
"""Set in the environment of processes that an engine of tita starts."""


def register() -> None:
    """Register the combined model classes with vLLM; their modules are imported when needed."""
    from vllm import ModelRegistry

    parent = multiprocessing.parent_process()
    if parent is not None and os.environ.get(STARTED_BY_TITA):
        # A signal to the process group, such as Ctrl-C in a terminal, is for the parent: it drains
        # and then ends this process.
        os.setpgrp()
        threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    where = "tita.vllm_plugin.guided_models"
    for family in FAMILIES.values():
        for name in (guided_name(family), plain_name(family), draft_name(family)):
            ModelRegistry.register_model(name, f"{where}:{name}")


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when its parent has ended, which may have been killed.

    vLLM's engine process does not notice, and would hold its GPUs.
    """
    parent.join()
    os._exit(1)
