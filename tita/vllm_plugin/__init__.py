"""A vLLM plugin: base, reward and reference model as one vLLM model, whose logits are combined.

`register` is an entry point of the group `vllm.general_plugins`; vLLM calls it in each of its
processes.
"""

from tita.vllm_plugin.families import FAMILIES, guided_name, plain_name


def register() -> None:
    """Register the combined model classes with vLLM; their modules are imported when needed."""
    from vllm import ModelRegistry

    where = "tita.vllm_plugin.guided_models"
    for family in FAMILIES.values():
        for name in (guided_name(family), plain_name(family)):
            ModelRegistry.register_model(name, f"{where}:{name}")
