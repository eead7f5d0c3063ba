"""Reward models that are LoRA adapters of one model, which vLLM loads once."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import supports_lora

from tita.errors import TitaError
from tita.vllm_plugin.adapter_layers import adapted_layers, steering_name
from tita.vllm_plugin.families import Family
from tita.vlm.adapters import AdapterFiles, AdapterPool
from tita.vlm.loading import Models

_REMEDY = "give the merged model, or choose --engine transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapters:
    """The adapters of an engine, and their layers."""

    requests: Mapping[str, LoRARequest]
    """What vLLM is given with a request, by role."""
    layers: frozenset[str]
    """vLLM's names of the layers that they change."""
    rank: int
    """One of the ranks that vLLM supports; at least that of each adapter."""
    connector: bool
    """Whether they change the layers between vision tower and language model."""

    def engine_args(self, *, max_loaded: int) -> dict[str, Any]:
        """Fields of vLLM's `EngineArgs`.

        Args:
            max_loaded: maximum number of adapters in memory.
        """
        return {
            "enable_lora": True,
            "max_loras": min(max_loaded, len(self.requests)),
            "max_lora_rank": self.rank,
            "lora_target_modules": sorted(self.layers),
            "enable_tower_connector_lora": self.connector,
        }


def adapter_roles(models: Models) -> list[str]:
    """The reward models that are adapters.

    Raises:
        TitaError: they are of several models, or see images in different aspects.
    """
    found = {role: vlm for role, vlm in models.by_role().items() if vlm.adapter is not None}
    for role, vlm in found.items():
        first = next(iter(found.values()))
        if vlm.adapters is not first.adapters:
            what = "is an adapter of another model than the others"
        elif vlm.image_aspect != first.image_aspect:
            what = f"sees images with aspect {vlm.image_aspect}, another adapter not"
        else:
            continue
        raise TitaError(
            f"reward model {role} {what}; engine vllm has adapters of one model, with one input",
            where=vlm.name,
            remedy=_REMEDY,
        )
    return [*found]


def served_adapters(models: Models, family: Family, *, module_number: int) -> ServedAdapters | None:
    """The adapters among the models, if there are some.

    Args:
        models: outlines.
        family: of all models.
        module_number: place of the adapters' model among the steering models.

    Raises:
        TitaError: vLLM cannot apply an adapter.
    """
    roles = adapter_roles(models)
    if not roles:
        return None
    pool = models.by_role()[roles[0]].adapters
    assert isinstance(pool, AdapterPool)
    vllm_class = getattr(
        import_module(f"vllm.model_executor.models.{family.module}"), family.vllm_class
    )
    files = {role: pool.files[role] for role in roles}
    if not supports_lora(vllm_class):
        raise TitaError(
            f"vLLM has no LoRA for {family.architecture}",
            where=str(files[roles[0]].folder),
            remedy=_REMEDY,
        )
    layers, connector = set[str](), False
    parts_of_vllm: tuple[str, ...] = ("language_model", "multi_modal_projector")
    if not vllm_class.supports_tower_connector_lora:
        parts_of_vllm = parts_of_vllm[:1]
    for each in files.values():
        names = adapted_layers(
            each.shapes, vllm_class=vllm_class, module=steering_name(module_number)
        )
        parts = {path: name.split(".")[1] for path, name in names.items()}
        for path, part in parts.items():
            if part not in parts_of_vllm:
                raise TitaError(
                    f"the adapter changes {path}; engine vllm applies adapters of "
                    f"{family.architecture} to {' and '.join(parts_of_vllm)} only",
                    where=str(each.folder),
                    remedy=_REMEDY,
                )
        layers |= set(names.values())
        connector = connector or "multi_modal_projector" in parts.values()
    rank = _rank(files)
    for each in files.values():
        _check_settings(each, rank=rank)
    return ServedAdapters(
        requests={
            role: LoRARequest(lora_name=role, lora_int_id=number, lora_path=str(each.folder))
            for number, (role, each) in enumerate(files.items(), start=1)
        },
        layers=frozenset(layers),
        rank=rank,
        connector=connector,
    )


def _check_settings(files: AdapterFiles, *, rank: int) -> None:
    """Check what vLLM reads when a request first uses an adapter, and ends if it refuses it.

    Raises:
        TitaError: vLLM refuses it.
    """
    try:
        settings = PEFTHelper.from_local_dir(str(files.folder), None)
        settings.validate_legal(LoRAConfig(max_lora_rank=rank))
    except (ValueError, TypeError) as error:
        raise TitaError(
            f"vLLM cannot apply the adapter ({error})", where=str(files.folder), remedy=_REMEDY
        ) from None


def _rank(files: Mapping[str, AdapterFiles]) -> int:
    """The smallest rank of vLLM that has room for all of these."""
    largest = max(files.values(), key=lambda each: each.rank)
    possible = [rank for rank in sorted(get_args(MaxLoRARanks)) if rank >= largest.rank]
    if not possible:
        raise TitaError(
            f"the adapter has rank {largest.rank}, and vLLM at most {max(get_args(MaxLoRARanks))}",
            where=str(largest.folder),
            remedy=_REMEDY,
        )
    return int(possible[0])
