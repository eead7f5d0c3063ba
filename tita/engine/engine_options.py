"""Which engine answers, and how vLLM runs the models. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from tita.errors import TitaError

EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM runs the models.

    Raises:
        TitaError: a value is out of range.
    """

    dtype: str = "auto"
    """Weight dtype of all models; `auto` is the base checkpoint's."""
    max_batch: int = 256
    """Maximum number of running requests."""
    max_model_len: int | None = None
    """Maximum number of tokens of prompt and answer together; the smallest model's if not given."""
    prefill_tokens: int | None = None
    """Maximum number of tokens per step; vLLM's default if not given."""
    tensor_parallel: int = 1
    """GPUs that each layer is split over."""
    pipeline_parallel: int = 1
    """Groups of GPUs that the layers are distributed over."""
    memory_share: float = 0.9
    """Fraction of a GPU's memory for weights and KV cache."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache; what `memory_share` leaves if not given."""
    block_size: int | None = None
    """Tokens per block of the KV cache; vLLM's default if not given."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share their KV."""
    compile: bool = True
    """Whether the models are compiled, and captured as CUDA graphs."""
    processes: bool = True
    """Whether vLLM's engine runs in a process of its own."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise TitaError(f"{name} is {getattr(self, name)}", remedy="give 1 or more")
        if not 0 < self.memory_share <= 1:
            raise TitaError(
                f"memory_share is {self.memory_share}", remedy="give more than 0, at most 1"
            )
