"""TRL's trainer with what it lacks for images: remembered reference log-probabilities.

TRL 1.16 refuses `precompute_ref_log_probs` for datasets with an image column, and runs the vision
tower for the chosen and for the rejected answer of the same image.
"""

import inspect
from collections.abc import Callable
from typing import Any

from trl import DPOTrainer

LogProbs = tuple[list[float], list[float]]
"""Of the chosen and of the rejected answers, in the order of the pairs."""


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` on rows that `PairCollator` takes, without a reference model in memory."""

    def __init__(self, *, recall: Callable[[Callable[[], LogProbs]], LogProbs], **options: Any):
        """As `DPOTrainer`.

        Args:
            recall: gives the remembered log-probabilities, or calls its argument on every rank to
                compute them and remembers the outcome.
        """
        self._recall = recall
        super().__init__(**options)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's would name a working folder as the model. `run.json` says what this is."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        from tita.train.dataset import REFERENCE

        found = self._recall(lambda: self._reference(dataset, batch_size))
        for column, values in zip(REFERENCE, found, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _reference(self, dataset: Any, batch_size: int) -> LogProbs:
        """One pass of the untrained model over all pairs, shared out among the ranks."""
        import torch
        from torch.utils.data import DataLoader
        from trl.models import prepare_deepspeed

        from tita.terminal import progress

        loader = self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )
        # The trainer's own engine does not exist yet; under ZeRO-3 the weights are sharded.
        sharded = self.is_deepspeed_enabled
        engine = prepare_deepspeed(self.model, self.accelerator) if sharded else self.model
        engine.eval()
        parts: list[tuple[Any, Any]] = []
        with progress("reference", total=len(loader), unit="batches") as advance:
            for batch in loader:
                both = self.compute_ref_log_probs(engine, batch)
                chosen, rejected = self.accelerator.gather_for_metrics(both)
                parts.append((chosen.float().cpu(), rejected.float().cpu()))
                advance()
        chosen, rejected = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
        return chosen, rejected


_ENCODED_ONCE = (
    *("aya_vision", "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision"),
    *("qwen2_5_vl", "qwen2_vl", "smolvlm"),
)
"""Families whose image features hang on nothing but the image, and come as one tensor or list."""
_OF_IMAGES = (
    "batch_num_images",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "pixel_values",
)


def encode_images_once(model: Any) -> bool:
    """Let a model run its vision tower once for both answers of a pair; False where it cannot.

    Batches carry every image twice, first for all chosen answers and then for all rejected ones,
    so the second half of the features equals the first, tiles and grids included. Families that
    were not looked at are left as they are: some give features of several layers.
    """
    import torch

    if model.config.model_type not in _ENCODED_ONCE:
        return False
    inner = model.model
    encode = inner.get_image_features
    names = tuple(inspect.signature(encode).parameters)

    def once(*given: Any, **named: Any) -> Any:
        options = dict(zip(names, given, strict=False)) | named
        for name in _OF_IMAGES:
            if (value := options.get(name)) is not None:
                options[name] = value[: len(value) // 2]
        features = encode(**options)
        found = features.pooler_output
        # One tensor, or one for each prompt.
        both = torch.cat([found, found]) if isinstance(found, torch.Tensor) else (*found, *found)
        features.pooler_output = both
        return features

    inner.get_image_features = once
    return True
