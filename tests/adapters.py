"""LoRA adapters of tiny models, as `train-dpo` leaves them."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tita.vlm.loading import VLM

VISION = r".*\b(vision_tower|vision_model|visual)\..*"


def save_adapter(model: Any, into: Path, *, base: Path | str, seed: int, **settings: Any) -> Path:
    """Write a random adapter of a model, which stays as it is."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(**(options | {"exclude_modules": VISION} | settings))
    )
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=dice))
    adapted.save_pretrained(str(into))
    config = into / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(fields))
    return into


def merged(vlm: VLM, folder: Path) -> VLM:
    """A model of its own with an adapter merged into it by peft: what the adapter must equal."""
    whole = PeftModel.from_pretrained(copy.deepcopy(vlm.model), str(folder)).merge_and_unload()
    return dataclasses.replace(vlm, model=whole.eval(), adapter=None, adapters=None)
