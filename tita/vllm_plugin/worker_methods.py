"""Methods that vLLM adds to its worker class (`worker_extension_cls`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.lora.layers import BaseLayerWithLoRA

from tita.vllm_plugin.drafting import DraftedBatch
from tita.vllm_plugin.row_table import table_of


class WorkerMethods:
    """What the engine asks of each worker."""

    def tita_adapted_layers(self) -> list[str]:
        """Names of the layers of this process that vLLM applies LoRA adapters to."""
        model = self.get_model()  # type: ignore[attr-defined]
        return [name for name, each in model.named_modules() if isinstance(each, BaseLayerWithLoRA)]

    def tita_follow_drafts(self) -> None:
        """Read requests and drafts in the model runner, from now on."""
        runner = self.model_runner  # type: ignore[attr-defined]
        table = table_of(self.vllm_config)  # type: ignore[attr-defined]
        batch = DraftedBatch(runner, table)
        table.follow(batch)
        runner.get_draft_model().follow(batch, runner.get_model())

    def tita_choices(
        self, spans: Mapping[str, tuple[int, int]], finished: Sequence[str]
    ) -> dict[str, list[dict[str, Any] | None]]:
        """What was chosen for requests, each as the fields of `SampledToken`.

        Args:
            spans: keys of requests, each with the first position asked for and the one after the
                last.
            finished: keys of requests whose records are dropped.
        """
        table = table_of(self.vllm_config)  # type: ignore[attr-defined]
        table.forget(finished)
        return {
            key: [None if each is None else dataclasses.asdict(each) for each in choices]
            for key, choices in table.choices(spans).items()
        }
