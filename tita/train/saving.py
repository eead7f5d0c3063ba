"""The model at the end: one ordinary transformers folder, whatever it was trained with."""

import json
from pathlib import Path
from typing import Any

from tita.train.group import together
from tita.vlm import Aspect, write_aspect


def save_model(trainer: Any, *, start: str, into: Path, name: str) -> None:
    """Write weights that `from_pretrained` loads, whole under ZeRO-3 and with LoRA merged.

    Every rank calls this. Beside a merged model its adapter stays in `adapter/`.

    Args:
        trainer: has trained it.
        start: where the model lies here that the training started from.
        into: a folder.
        name: what that model is called elsewhere: a hub name, or a tree in the store.
    """
    from peft import PeftModel

    if not isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        trainer.save_model(str(into))
        _leave_out_arguments(trainer, into)
        return
    adapter = into.with_name("adapter")
    trainer.save_model(str(adapter))
    _leave_out_arguments(trainer, adapter)

    def merge() -> None:
        if trainer.is_world_process_zero():
            _merge(adapter, start=start, into=into, dtype=trainer.model.dtype)
            _name_base(adapter, name)

    together(merge)


def save_preparation(processor: Any, *, image_aspect: Aspect, into: Path) -> None:
    """Write beside a saved model how it was shown prompts and images, so that inference does so."""
    processor.save_pretrained(str(into))
    write_aspect(into, image_aspect)


def _leave_out_arguments(trainer: Any, folder: Path) -> None:
    """Drop what differs from run to run of the same training: paths of this machine, pickled."""
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)


def _name_base(adapter: Path, name: str) -> None:
    """Say what the adapter is for: peft has written down a path of this machine."""
    (adapter / "README.md").unlink(missing_ok=True)
    config = adapter / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(told, indent=2, sort_keys=True))


def _merge(adapter: Path, *, start: str, into: Path, dtype: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import unset_hf_deepspeed_config

    # While it is set, ZeRO-3 would share this model out among the ranks too.
    unset_hf_deepspeed_config()
    whole = AutoModelForImageTextToText.from_pretrained(start, dtype=dtype)
    PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload().save_pretrained(str(into))
